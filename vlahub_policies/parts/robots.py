"""Interfaces of the robots that published policies are trained on."""

from dataclasses import replace

from vlahub.interface import Camera, Field, Interface

LIBERO = Interface(
    main=Camera("agentview", turned=180),
    wrists=(Camera("eye_in_hand", turned=180),),
    state=(
        Field("position", 3, "m", frame="world"),
        Field("rotation", 3, "rad", rotation="axis_angle", frame="world"),
        Field("fingers", 2, "m"),
    ),
    action=(
        Field("position", 3, "1", reference="delta", frame="world", low=-1, high=1),
        Field("rotation", 3, "1", reference="delta", rotation="axis_angle", frame="world", low=-1, high=1),
        Field("gripper", 1, "1", low=-1, high=1, open=-1, closed=1),
    ),
    control_hz=20,
    optional_cameras=("eye_in_hand",),
)

# OpenVLA-OFT's: both cameras, which it cannot do without, or the outer one alone and no state
LIBERO_TWO_CAMERAS = replace(LIBERO, optional_cameras=())
LIBERO_ONE_CAMERA = replace(LIBERO_TWO_CAMERAS, wrists=(), state=())

_ROBOTWIN_JOINTS = tuple(
    field for side in ("left", "right") for field in (Field(f"{side}_joints", 6, "rad"), Field(f"{side}_gripper", 1, "1", low=0, high=1, open=1, closed=0))
)
ROBOTWIN = Interface(main=Camera("head"), wrists=(Camera("left_wrist"), Camera("right_wrist")), state=_ROBOTWIN_JOINTS, action=_ROBOTWIN_JOINTS)
ROBOTWIN_HEAD_STATE = replace(ROBOTWIN, wrists=())
ROBOTWIN_HEAD = replace(ROBOTWIN_HEAD_STATE, state=())

# RLinf's Franka data and the ManiSkill twin: the tool in the base frame; rotations are increments in the tool's own frame
TWIN = Interface(
    main=Camera("third_view"),
    state=(
        Field("position", 3, "m", frame="robot_base"),
        Field("rotation", 3, "rad", rotation="euler_xyz", frame="robot_base"),
        Field("gripper", 1, "m", open=0.08, closed=0.0),
    ),
    action=(
        Field("position", 3, "m", reference="delta", frame="robot_base"),
        Field("rotation", 3, "rad", reference="delta", rotation="euler_xyz", frame="tool"),
        Field("gripper", 1, "1", low=-1, high=1, open=1, closed=-1),
    ),
    control_hz=5,
)

# a WidowX on the Bridge table, in ManiSkill
BRIDGE = Interface(
    main=Camera("3rd_view_camera"),
    state=(),
    action=(
        Field("position", 3, "m", reference="delta", frame="robot_base"),
        Field("rotation", 3, "rad", reference="delta", rotation="euler_xyz", frame="robot_base"),
        Field("gripper", 1, "1", low=-1, high=1, open=1, closed=-1),
    ),
    control_hz=5,
)
