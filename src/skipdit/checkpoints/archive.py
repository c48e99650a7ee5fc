"""Read files of `torch.save` without unpickling untrusted objects: check sizes and checksums, then load tensors only.

The limits are far above what trainers write: a checkpoint of HunyuanDiT with its average and two moments has 6,500
tensors and a pickle of 1.5 MB.
"""

import argparse
import pickletools
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from skipdit.files.untrusted import open_regular, printable

MAX_RECORDS = 20_000  # members of the archive, one per tensor
MAX_PICKLE_BYTES = 8 * 2**20
MAX_PICKLE_OPERATIONS = 1_000_000
MAX_NESTING = 16  # of containers around a tensor
MAX_SHARING = 2  # bytes of all tensors per byte of their storages, above SHARING_SLACK
SHARING_SLACK = 64 * 2**20  # bytes

# globals that a pickle may name. torch also allows `bytearray(10**12)`, and sparse, meta and nested tensors.
ALLOWED_GLOBALS = {
    "collections OrderedDict",
    "argparse Namespace",
    "torch device",
    "torch Size",
    "torch.nn.parameter Parameter",
    "torch.storage UntypedStorage",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state",
    "__builtin__ set",
    "builtins set",
}
OPAQUE_OPCODES = {"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4", "OBJ"}


def read_archive(path: Path) -> object:
    """Return the tensors in their plain containers, memory-mapped on the CPU.

    `ValueError` if the archive is damaged, contains anything else, or would take more memory than its size suggests.
    """
    try:
        records = _check_records(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        _check_storages(list(_tensors(content)), path.stat().st_size, records)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # zipfile, struct, pickle and torch raise a dozen types on a damaged archive
        reason = str(error) if type(error) is ValueError else "damaged"
        raise ValueError(f"{printable(path.name)} is not a readable PyTorch checkpoint: {reason}") from error
    return content


def _check_records(path: Path) -> Counter[int]:
    """Return the number of records of each size (bytes)."""
    with open_regular(path) as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("truncated, or not written by torch.save of PyTorch 1.6 or newer")
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if len(records) > MAX_RECORDS:
                raise ValueError(f"it has {len(records):,} records, at most {MAX_RECORDS:,} are read")
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise ValueError("its records are compressed, which torch.save never does")
            if sum(record.file_size for record in records) > path.stat().st_size:
                raise ValueError("its records are larger than the file")
            pickles = [record for record in records if record.filename.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError("it has no data.pkl, which torch.save writes")
            if pickles[0].file_size > MAX_PICKLE_BYTES:
                raise ValueError(f"its data.pkl has more than the {MAX_PICKLE_BYTES:,} bytes that are read")
            if (broken := archive.testzip()) is not None:
                raise ValueError(f"the checksum of its record {printable(broken)} is wrong")
            _check_pickle(archive.read(pickles[0]))
            return Counter(record.file_size for record in records)


def _check_pickle(content: bytes) -> None:
    references: set[str] = set()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if number >= MAX_PICKLE_OPERATIONS:
            raise ValueError(f"its data.pkl has more than {MAX_PICKLE_OPERATIONS:,} operations")
        if opcode.name == "GLOBAL":
            references.add(str(argument))
        elif opcode.name in OPAQUE_OPCODES:
            references.add(opcode.name)
    unsafe = sorted(name.replace(" ", ".") for name in references if not _is_allowed(name))
    if unsafe:
        raise ValueError(f"refused, because loading it would call {printable(', '.join(unsafe))}")


def _is_allowed(name: str) -> bool:
    module, _, attribute = name.partition(" ")
    if name in ALLOWED_GLOBALS:
        return True
    if module != "torch" or "." in attribute:
        return False
    return attribute.endswith("Storage") or isinstance(getattr(torch, attribute, None), torch.dtype)


def _tensors(content: object) -> Iterator[Tensor]:
    """Yield every tensor in the containers."""
    level, visited = [content], set()
    for _ in range(MAX_NESTING):
        containers: list[Iterable[object]] = []
        for node in level:
            if id(node) in visited:
                continue
            match node:
                case Tensor():
                    yield node
                    continue
                case argparse.Namespace():
                    containers.append(vars(node).values())
                case Mapping():
                    containers.append(node.values())
                case list() | tuple() | set():
                    containers.append(node)
            visited.add(id(node))
        level = list(chain.from_iterable(containers))
    if level:
        raise ValueError(f"it is nested deeper than {MAX_NESTING} levels")


def _check_storages(tensors: list[Tensor], file_size: int, records: Counter[int]) -> None:
    """Raise `ValueError` on tensors larger than their data in the file: with stride 0, many views of one storage, or a
    storage that extends past its record, which torch does not check when it maps a file."""
    storages, total = {}, 0
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"it contains a {tensor.layout} tensor on {tensor.device}, not a plain one on the CPU")
        storage = tensor.untyped_storage()
        size = tensor.numel() * tensor.element_size()
        if size > storage.nbytes():
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} is larger than its record of {storage.nbytes():,} bytes"
            )
        storages[storage.data_ptr()] = max(storages.get(storage.data_ptr(), 0), storage.nbytes())
        total += size
    for size, count in Counter(storages.values()).items():
        if count > records[size]:
            raise ValueError(f"{count} of its storages have {size:,} bytes, but only {records[size]} of its records do")
    stored = sum(storages.values())
    if stored > file_size:
        raise ValueError(f"its tensors have {stored:,} bytes, the file {file_size:,}")
    if total > MAX_SHARING * stored + SHARING_SLACK:
        raise ValueError(f"its tensors have {total:,} bytes, but the file stores {stored:,} of them")
