"""`skipdit latents`: read pictures, clips and captions (`sources`, `tars`), and write the folder that
`skipdit.data.latents` reads (`encode`)."""
