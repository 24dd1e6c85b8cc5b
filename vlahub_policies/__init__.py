"""Policy families, one readable file each; `parts/` holds what they truly share."""

from vlahub_policies import openvla_oft_cards  # noqa: F401  registers the family and its known checkpoints
