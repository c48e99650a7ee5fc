"""`skipdit latents`: where pictures, clips and captions come from (`sources`, `tars`), and how they become the folder
that `skipdit.data.latents` reads (`encode`)."""
