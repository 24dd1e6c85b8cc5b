"""Environment families. Each folder holds one family: its simulation, its assets, its experts, its registration."""

from vlahub_envs import evac as evac
from vlahub_envs import libero as libero  # their import registers their ids
from vlahub_envs import robotwin as robotwin
from vlahub_envs import twin as twin
