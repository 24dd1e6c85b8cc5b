"""Environment families. Each folder holds one family: its simulation, its assets, its experts, its registration."""

from vlahub_envs import robotwin as robotwin  # its import registers its ids
