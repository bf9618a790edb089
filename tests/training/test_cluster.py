"""TF_CONFIG, the meeting of its workers before TensorFlow connects them, and TPUs' addresses."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from inputs.errors import InputError
from training import cluster, strategy

ROOT = pathlib.Path(__file__).parents[2]
TWO = {"worker": ["a:1", "b:1"]}


def tf_config(workers, job="worker", index=0):
    return json.dumps({"cluster": workers, "task": {"type": job, "index": index}})


@pytest.mark.parametrize(
    ("text", "own", "workers"),
    [
        (tf_config(TWO, index=1), 1, ["worker 0 (a:1)", "worker 1 (b:1)"]),
        (tf_config(TWO, index="1"), 1, ["worker 0 (a:1)", "worker 1 (b:1)"]),  # from a template
        (tf_config({"chief": ["a:1"]}, "chief"), 0, ["chief 0 (a:1)"]),
        (
            tf_config({**TWO, "chief": ["[::1]:2222"]}),
            1,
            ["chief 0 (::1:2222)", "worker 0 (a:1)", "worker 1 (b:1)"],
        ),
    ],
)
def test_a_cluster_is_read(text, own, workers, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    found = cluster.read_cluster()
    assert found.own == own and [str(worker) for worker in found.workers] == workers


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_tf_config_is_none(text, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    assert cluster.read_cluster() is None
    assert not cluster.wait_until_reachable("", 0.0, pytest.fail)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "names no cluster of workers"),
        ("{}", "names no cluster of workers"),
        ('"worker"', "names no cluster of workers"),
        (tf_config({}), "names no cluster of workers"),
        (tf_config({"worker": []}), "names no cluster of workers"),
        (tf_config({"worker": "a:1"}), "gives no list of addresses for 'worker'"),
        (tf_config({"worker": [1, 2]}), "gives no list of addresses for 'worker'"),
        (tf_config({"worker": ["a", "b:1"]}), "has the address 'a', which is not host:port"),
        (tf_config({"worker": ["a:x"]}), "has the address 'a:x', which is not host:port"),
        (tf_config({"worker": ["a:70000"]}), "has the address 'a:70000', which is not"),
        (tf_config({"worker": ["http://a:1"]}), "has the address 'http://a:1', which is not"),
        (tf_config({"worker": ["::1:1"]}), "has the address '::1:1', which is not"),
        (tf_config({"worker": ["a:1", "a:1"]}), "gives the address a:1 to two workers"),
        (tf_config({**TWO, "ps": ["c:1"]}), "has a job 'ps'"),
        (tf_config({**TWO, "evaluator": ["c:1"]}), "has a job 'evaluator'"),
        (tf_config(TWO, "evaluator"), "starts an evaluator"),
        (tf_config(TWO, "ps"), "says that this process is 'ps' number 0"),
        (tf_config(TWO, index=2), "says that this process is 'worker' number 2"),
        (tf_config(TWO, index=-1), "says that this process is 'worker' number -1"),
        (tf_config(TWO, index="one"), "says that this process is 'worker' number 'one'"),
        (tf_config(TWO, index=True), "says that this process is 'worker' number True"),
        (tf_config(TWO, index=[0]), "says that this process is 'worker' number [0]"),
        (tf_config(TWO, "chief"), "says that this process is 'chief' number 0"),
        (json.dumps({"cluster": TWO}), "says that this process is None number None"),
        (json.dumps({"cluster": TWO, "task": 1}), "says that this process is None number None"),
    ],
)
def test_an_invalid_tf_config_is_refused(text, said, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(InputError) as error:
        strategy.connect("")
    assert str(error.value).startswith(f"TF_CONFIG {said}")
    assert str(error.value).endswith("or unset it.")


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("localhost", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture
def meet(monkeypatch):
    """A function that lets worker `own` of a cluster meet the others; returns what it logged."""
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.5)

    def run(ports, own, seconds, log=None):
        workers = tuple(
            cluster.Worker("worker", i, "localhost", port) for i, port in enumerate(ports)
        )
        said = [] if log is None else log
        together = cluster.Cluster(workers, own)
        cluster._Meeting(together, seconds, time.monotonic() + seconds, said.append).run()
        return said

    return run


def test_workers_meet_in_any_order(meet):
    ports = free_ports(3)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        second = pool.submit(meet, ports, 1, 30)
        time.sleep(0.3)
        first = pool.submit(meet, ports, 0, 30)
        time.sleep(0.3)
        assert not second.done() and not first.done()
        third = pool.submit(meet, ports, 2, 30)
        said = [one.result(timeout=30) for one in (first, second, third)]
    last = f"Waiting for worker 2 (localhost:{ports[2]}), for at most "
    assert said[0][-1].startswith(last) and said[1][-1].startswith(last)
    assert f"worker 0 (localhost:{ports[0]}) (Connection refused)" in said[1][0]


def test_who_is_missing_at_the_end_is_named_by_all(meet):
    ports = free_ports(3)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(meet, ports, 0, 1.5)
        time.sleep(0.1)
        second = pool.submit(meet, ports, 1, 30)
        expected = (
            rf"^TF_CONFIG: worker 2 \(localhost:{ports[2]}\) did not come within 1.5 s\. Start"
        )
        for one in (first, second):
            with pytest.raises(InputError, match=expected):
                one.result(timeout=20)
    with pytest.raises(InputError, match=r"worker 0 .*refused\) did not come within 0.3 s"):
        meet(ports, 2, 0.3)


def test_a_worker_that_ends_while_it_waits_is_missing_again(meet):
    ports = free_ports(3)
    said = []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(meet, ports, 0, 30, said)
        with pytest.raises(InputError, match="worker 2 .*did not come within 0.5 s"):
            meet(ports, 1, 0.5)
        with pytest.raises(InputError, match="worker 1 .*did not come within 0.5 s"):
            meet(ports, 2, 0.5)
        others = [pool.submit(meet, ports, own, 30) for own in (2, 1)]
        for one in (first, *others):
            one.result(timeout=30)
    one, two = (f"worker {i} (localhost:{ports[i]})" for i in (1, 2))
    waited = [line.split(", for")[0].removeprefix("Waiting for ") for line in said]
    assert waited[0] == f"{one}, {two}" and {one, two} < set(waited)


def test_two_processes_with_the_same_index_are_refused(meet):
    ports = free_ports(3)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first, second = (pool.submit(meet, ports, own, 3) for own in (0, 1))
        time.sleep(0.5)
        with pytest.raises(InputError, match="another process is worker 1 .* already. Give each"):
            meet(ports, 1, 10)
        for one in (first, second):
            with pytest.raises(InputError, match="worker 2 .* did not come within 3 s"):
                one.result(timeout=20)


def test_a_port_in_use_is_named(meet):
    with socket.create_server(("localhost", 0)) as other:
        ports = [other.getsockname()[1], *free_ports(1)]
        with pytest.raises(InputError, match=r"worker 0 .* cannot open its port \(Address alr"):
            meet(ports, 0, 5)


@pytest.mark.parametrize("answer", [b"", b"\x00\x00\x12\x04\x00\n", b"[1]\n", b'{"other": 1}\n'])
def test_another_program_at_the_chiefs_address_is_not_the_chief(answer, meet):
    """Such as TensorFlow's server of a process that has not ended yet."""
    with (
        socket.create_server(("localhost", 0)) as other,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = other.accept()
                    with connection:
                        connection.sendall(answer)

        pool.submit(serve)
        ports = [other.getsockname()[1], *free_ports(1)]
        with pytest.raises(InputError, match=r"worker 0 .* did not come within 1 s"):
            meet(ports, 1, 1)
        other.shutdown(socket.SHUT_RDWR)


def test_the_chief_waits_on_after_a_stray_connection(meet):
    ports = free_ports(2)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(meet, ports, 0, 30)
        time.sleep(0.2)
        numbers = (b'{"worker": 9}\n', b'{"worker": "1"}\n', b'{"worker": []}\n', b"[1]\n")
        for sent in (b"", b"GET / HTTP/1.1\r\n\r\n", *numbers):
            with socket.create_connection(("localhost", ports[0])) as stray:
                stray.sendall(sent)
        meet(ports, 1, 30)
        first.result(timeout=30)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_process_that_waits_for_others(signum, tmp_path):
    addresses = [f"localhost:{port}" for port in free_ports(2)]
    config = tf_config({"worker": addresses})
    flags = ["--synthetic", f"--model_dir={tmp_path}"]
    with subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *flags],
        env=os.environ | {"TF_CONFIG": config},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        waits = next(line for line in process.stderr if line.startswith("Waiting"))
        process.send_signal(signum)
        said = process.stderr.read()
    assert waits == f"Waiting for worker 1 ({addresses[1]}), for at most 600 s\n"
    assert process.returncode == 128 + signum
    name = signal.Signals(signum).name
    assert f"train.py: {name}: stopped before the training began" in said
    assert "Traceback" not in said


def test_a_worker_that_never_comes_ends_the_run(in_process, monkeypatch, capfd, tmp_path):
    ports = free_ports(2)
    config = tf_config({"worker": [f"localhost:{port}" for port in ports]}, index="0")
    monkeypatch.setenv("TF_CONFIG", config)
    flags = ["--synthetic", f"--model_dir={tmp_path}", "--connect_seconds=0.5"]
    assert in_process(flags) == 1
    waits, ends = capfd.readouterr().err.splitlines()
    assert waits == f"Waiting for worker 1 (localhost:{ports[1]}), for at most 0 s"
    assert ends.startswith(f"train.py: TF_CONFIG: worker 1 (localhost:{ports[1]}) did not come")


def test_the_time_limit_ends_a_process_whose_python_code_does_not_run():
    code = (
        "import ctypes; from training.cluster import time_limit\n"
        "with time_limit(60): pass\n"
        "with time_limit(0.2): ctypes.PyDLL(None).sleep(60)\n"  # holds Python's lock
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 1 and time.monotonic() - start < 30


def test_addresses_of_tpus():
    assert cluster.tpu_addresses("grpc://10.0.0.1:8470") == [("10.0.0.1", 8470)]
    assert cluster.tpu_addresses("10.0.0.1:8470,b:2") == [("10.0.0.1", 8470), ("b", 2)]
    assert cluster.tpu_addresses("my-tpu") == [] == cluster.tpu_addresses("local")


@pytest.mark.parametrize("address", ["localhost:1", "grpc://localhost:1"])
def test_a_tpu_address_that_does_not_answer_is_refused(
    address, in_process, capfd, tmp_path, monkeypatch
):
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.05)
    flags = ["--synthetic", f"--model_dir={tmp_path}", f"--tpu={address}", "--connect_seconds=0.2"]
    assert in_process(flags) == 1
    waits, ends = capfd.readouterr().err.splitlines()
    assert waits.startswith(f"Waiting for --tpu={address} (")
    assert ends.startswith(f"train.py: --tpu={address}: nothing answered at localhost:1 for 0.2 s")


def test_the_name_of_a_tpu_away_from_google_cloud_is_refused(monkeypatch):
    monkeypatch.setenv("GCE_METADATA_IP", "localhost:1")
    with pytest.raises(InputError, match=r"^--tpu=foo: this name cannot be looked up \(.*refused"):
        strategy.connect("foo")
