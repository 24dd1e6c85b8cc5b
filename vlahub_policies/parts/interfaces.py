"""The layouts of states and actions that published checkpoints were trained with."""

from vlahub.interface import Camera, Field, Interface

LIBERO_STATE = (
    Field("position", 3, "m", frame="world"),
    Field("rotation", 3, "rad", rotation="axis_angle", frame="world"),
    Field("fingers", 2, "m"),
)
LIBERO_ACTION = (
    Field("position", 3, "1", reference="delta", frame="world", low=-1, high=1),
    Field("rotation", 3, "1", reference="delta", rotation="axis_angle", frame="world", low=-1, high=1),
    Field("gripper", 1, "1", low=-1, high=1, open=-1, closed=1),
)
ROBOTWIN_JOINTS = tuple(
    field
    for side in ("left", "right")
    for field in (Field(f"{side}_joints", 6, "rad"), Field(f"{side}_gripper", 1, "1", low=0, high=1, open=1, closed=0))
)

# LIBERO's pictures are turned by 180 degrees from what a person expects, in the data sets and here
LIBERO = Interface(
    main=Camera("agentview", turned=180), wrists=(Camera("wrist", turned=180),), state=LIBERO_STATE, action=LIBERO_ACTION, control_hz=20
)
ROBOTWIN = Interface(
    main=Camera("head"), wrists=(Camera("left_wrist"), Camera("right_wrist")), state=ROBOTWIN_JOINTS, action=ROBOTWIN_JOINTS
)
