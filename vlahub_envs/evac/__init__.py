"""The EVAC world model: a video diffusion model that imagines what a robot's cameras would see, as a batched environment."""
