"""Every denoising transformer of diffusers at a size that runs in milliseconds."""
