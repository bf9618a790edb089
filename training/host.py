"""A TensorFlow server that stands for one host of a pod: python -m training.host INDEX.

`training.rehearsal` starts it. The server prints its address, and ends when its standard input
does, which is when the process that started it has ended, for whatever reason.
"""

import os
import sys

from inputs import process  # isort: split

import tensorflow as tf

JOB = "worker"


def main() -> None:
    """Serves until standard input ends."""
    index = int(sys.argv[1])
    # Port 0 is any free one. The addresses of the other hosts come from the coordinator.
    server = tf.distribute.Server(
        {JOB: {index: "127.0.0.1:0"}}, job_name=JOB, task_index=index, protocol="grpc"
    )
    print(server.target.rpartition("/")[2], flush=True)
    sys.stdin.read()
    os._exit(0)  # a server cannot be shut down (TensorFlow 2.20)


if __name__ == "__main__":
    process.run(main)
