import pickle
import socket
import threading

import numpy as np
import pytest

from vlahub.interface import Camera, Field, Interface
from vlahub.worker import Channel, Failure, Layout


def test_channel_keeps_what_has_arrived_and_takes_messages_of_any_size():
    ours, theirs = map(Channel, socket.socketpair())
    data = pickle.dumps("halved")
    theirs.socket.sendall(len(data).to_bytes(8, "little") + data[:3])
    ours.socket.settimeout(0.01)
    with pytest.raises(TimeoutError):
        ours.receive()
    theirs.socket.sendall(data[3:])
    theirs.send(1), theirs.send([2, 3])  # several at once
    assert [ours.receive() for _ in range(3)] == ["halved", 1, [2, 3]]

    large = np.random.default_rng(0).integers(256, size=5_000_000, dtype=np.uint8)
    sender = threading.Thread(target=theirs.send, args=(large,))
    sender.start()
    ours.socket.settimeout(10)
    assert np.array_equal(ours.receive(), large)
    sender.join()
    theirs.socket.close()
    with pytest.raises(EOFError):
        ours.receive()


def test_layout_gives_every_key_of_every_env_its_own_place():
    interface = Interface(main=Camera("a", 5, 7), wrists=(Camera("b", 3, 3), Camera("c", 3, 3)), state=(Field("q", 5, "rad"),), action=(Field("q", 5, "rad"),))
    layout = Layout(interface, 3)
    buffer = bytearray(2 * layout.size)
    slabs = [layout.arrays(buffer, start) for start in (0, layout.size)]
    assert {key: array.shape for key, array in slabs[0].items()} == {"main_images": (3, 5, 7, 3), "wrist_images": (3, 2, 3, 3, 3), "states": (3, 5)}
    places = [array[env] for slab in slabs for array in slab.values() for env in range(3)]
    for number, place in enumerate(places):
        place[...] = number
    assert all((place == number).all() for number, place in enumerate(places))


def test_failure_brings_back_the_exception_with_the_traceback():
    try:
        raise KeyError("which")
    except KeyError as error:
        failure = pickle.loads(pickle.dumps(Failure.of(error)))
    again = failure.exception()
    assert type(again) is KeyError and again.args == ("which",) and "test_worker.py" in again.__notes__[0]
