"""Pictures, clips and latents to learn from: what is read, from which files, and how it is cut."""
