"""Policy families, one readable file each; `parts/` holds what they truly share."""
