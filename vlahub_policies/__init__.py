"""Policy families, one readable file each; `parts/` holds what they truly share."""

from vlahub_policies import pi0_cards  # noqa: F401  registers pi0 and dexbotic with their known checkpoints
