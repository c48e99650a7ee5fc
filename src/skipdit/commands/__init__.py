"""One file per command: its options, each with its explanation, and what it does. Heavy imports happen when it runs."""
