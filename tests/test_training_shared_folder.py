"""Two processes that train together resume from one checkpoint, and wait for each other as long as it takes.

Run as a script, with a rank, a port and a folder, this file is one of the two processes.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_training_distributed import run_two
from training_runs import checkpoint_names, make_config, make_data

from skipdit.process_group import PATIENCE, leave_group
from skipdit.training import train


def test_processes_that_find_other_checkpoints_are_refused(tmp_path: Path) -> None:
    """As with a relative --out in two working directories."""
    config = make_config(make_data(tmp_path / "data"), max_steps=3)
    train(config, tmp_path / "0" / "run", device="cpu")
    (tmp_path / "1").mkdir()
    before = checkpoint_names(tmp_path / "0" / "run")
    for said, _ in run_two(tmp_path, __file__):
        assert "processes found other checkpoints in run: --out must be one shared folder" in said
        assert said.splitlines()[-1] == str(PATIENCE)
    assert checkpoint_names(tmp_path / "0" / "run") == before


def run_as_process(rank: str, port: str, folder: Path) -> None:
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    torch.set_num_threads(1)
    os.chdir(folder / rank)
    try:
        train(make_config(folder / "data", max_steps=6), Path("run"), device="cpu")
    except ValueError as error:
        print(error)
    print(dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout)
    leave_group()


if __name__ == "__main__":
    run_as_process(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
