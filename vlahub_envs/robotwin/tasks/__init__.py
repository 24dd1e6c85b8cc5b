"""One file per task: `click_bell.py` holds the class ClickBell, registered as vlahub/RoboTwin-ClickBell."""
