"""Environment families. Each folder holds one family: its simulation, its assets, its experts, its registration."""
