"""The servers that are compared: how each is installed and started, and what it is asked.

All of them run the same graph with one ONNX Runtime session of one thread a process or replica, and
as many of these as there are cores. Each has the batching that its documentation recommends.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from formats import Format, RowBinary, RowJson, RowList, RowV2, TextJson, TextV2
from workloads import Workload

SERVED = Path(__file__).with_name("served")
HOST = "127.0.0.1"
# The version with which this project's own environment runs the graph (constraints.txt).
COMMON = ("onnxruntime", "numpy", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What a command needs.

    Attributes:
        python: the interpreter of the server's environment.
        ports: free ports; the first is the one that answers.
        scratch: an empty folder for files of this start.
    """

    python: Path
    workload: Workload
    ports: Sequence[int]
    scratch: Path
    cores: int

    def script(self, name: str) -> str:
        """The path of a program beside the environment's Python."""
        return str(self.python.with_name(name))


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A server that is measured.

    Attributes:
        environment: the folder of its environment; None for the one that runs the bench.
        requirements: what is installed there, beside COMMON.
        formats: by the workload's name, the formats in which it can be asked.
        variables: its environment variables, from the same values as the command.
        note: what a reader of the table must know; it stands below it.
    """

    name: str
    title: str
    command: Callable[[Launch], Sequence[str]]
    formats: Mapping[str, Sequence[Format]]
    environment: str | None = None
    requirements: Sequence[str] = ()
    variables: Callable[[Launch], Mapping[str, str]] = field(default=lambda launch: {})
    note: str = ""


PREDICT = "/v1/predict"
INFER = "/v2/models/{}/infer"
ANY_JSON = {"text": [TextJson("/predict")], "rows": [RowJson("/predict")]}
ANY_V2 = {
    "text": [TextV2(INFER.format("model"))],
    "rows": [RowV2(INFER.format("model")), RowBinary(INFER.format("model"))],
}


def evalmode(launch: Launch) -> list[str]:
    """The server of this project with its default settings."""
    folder = str(launch.workload.folder)
    return [launch.script("evalmode"), "serve", folder, "--port", str(launch.ports[0])]


def plain(processes: int) -> Callable[[Launch], list[str]]:
    """The server that is written by hand, in so many processes."""

    def command(launch: Launch) -> list[str]:
        uvicorn = [str(launch.python), "-m", "uvicorn", "on_plain:app", "--host", HOST]
        return [*uvicorn, "--port", str(launch.ports[0]), "--workers", str(processes)]

    return command


def litserve(launch: Launch) -> list[str]:
    """A program that starts LitServe."""
    return [str(launch.python), str(SERVED / "on_litserve.py"), str(launch.ports[0])]


def bentoml(launch: Launch) -> list[str]:
    """BentoML's own command line."""
    return [
        launch.script("bentoml"),
        "serve",
        "on_bentoml:Classifier",
        "--working-dir",
        str(SERVED),
        "--host",
        HOST,
        "--port",
        str(launch.ports[0]),
    ]


def mlserver(launch: Launch) -> list[str]:
    """MLServer's own command line, which reads two files of settings."""
    http_port, grpc_port, metrics_port = launch.ports
    settings = {
        "host": HOST,
        "http_port": http_port,
        "grpc_port": grpc_port,
        "metrics_port": metrics_port,
        "parallel_workers": launch.cores,
        "environments_dir": str(launch.scratch / "environments"),
    }
    model: dict[str, object] = {"name": "model", "implementation": "on_mlserver.Runtime"}
    if launch.workload.name == "text":
        model |= {"max_batch_size": 64, "max_batch_time": 0.005}
    (launch.scratch / "settings.json").write_text(json.dumps(settings))
    (launch.scratch / "model-settings.json").write_text(json.dumps(model))
    return [launch.script("mlserver"), "start", str(launch.scratch)]


def ray(launch: Launch) -> list[str]:
    """A program that starts Ray and deploys to it."""
    program = [str(launch.python), str(SERVED / "on_ray.py")]
    return [*program, str(launch.ports[0]), str(launch.scratch)]


def kserve(launch: Launch) -> list[str]:
    """A program that starts KServe's model server, in one process as its default is."""
    program = [str(launch.python), str(SERVED / "on_kserve.py")]
    return [*program, "--http_port", str(launch.ports[0])]


def triton(launch: Launch) -> list[str]:
    """A program that starts Triton and its Python instances."""
    program = [str(launch.python), str(SERVED / "on_triton.py")]
    return [*program, *map(str, launch.ports), str(launch.scratch)]


def infinity(launch: Launch) -> list[str]:
    """A FastAPI application around Infinity's engine."""
    uvicorn = [str(launch.python), "-m", "uvicorn", "on_infinity:app", "--host", HOST]
    return [*uvicorn, "--port", str(launch.ports[0]), "--workers", str(launch.cores)]


# Plain FastAPI is measured with one process and with two; ratios refer to the better of the two.
PLAIN = ("plain", "plain-2")

PEERS = (
    Peer(
        name="evalmode",
        title="evalmode",
        command=evalmode,
        formats={
            "text": [TextJson(PREDICT)],
            "rows": [RowV2(INFER.format("encoder")), RowBinary(INFER.format("encoder"))],
        },
    ),
    Peer(
        name="plain",
        title="FastAPI, 1 process",
        command=plain(1),
        formats={"text": [TextJson(PREDICT)], "rows": [RowV2(INFER.format("model"))]},
    ),
    Peer(
        name="plain-2",
        title="FastAPI, 2 processes",
        command=plain(2),
        formats={"text": [TextJson(PREDICT)], "rows": [RowV2(INFER.format("model"))]},
    ),
    Peer(
        name="litserve",
        title="LitServe",
        command=litserve,
        formats=ANY_JSON,
        environment="litserve",
        requirements=("litserve",),
    ),
    Peer(
        name="bentoml",
        title="BentoML",
        command=bentoml,
        formats={"text": [TextJson("/predict")], "rows": [RowList("/infer")]},
        environment="bentoml",
        requirements=("bentoml",),
        variables=lambda launch: {
            "BENTOML_HOME": str(launch.scratch),
            "BENTOML_DO_NOT_TRACK": "true",
        },
        note="BentoML answers a row of ids as a list, since its batching joins lists.",
    ),
    Peer(
        name="mlserver",
        title="MLServer",
        command=mlserver,
        formats={"text": ANY_V2["text"], "rows": ANY_V2["rows"][:1]},
        environment="mlserver",
        requirements=("mlserver",),
        note="MLServer batches texts alone: it cannot join rows of different lengths.",
    ),
    Peer(
        name="ray",
        title="Ray Serve",
        command=ray,
        formats=ANY_JSON,
        environment="ray",
        requirements=("ray[serve]",),
        # By default Ray writes a token for its cluster into the user's home.
        variables=lambda launch: {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"},
    ),
    Peer(
        name="kserve",
        title="KServe",
        command=kserve,
        formats=ANY_V2,
        environment="kserve",
        requirements=("kserve",),
        note="KServe's Python server has no batching of its own.",
    ),
    Peer(
        name="triton",
        title="Triton",
        command=triton,
        # With batching, the first axis of each tensor is that of the batch.
        formats={"text": [TextV2(INFER.format("model"), shape=(1, 1))], "rows": ANY_V2["rows"]},
        environment="triton",
        requirements=("nvidia-pytriton",),
        # With Python 3.11.7 the instances of PyTriton 0.7.0 end with "'_thread.RLock' object has no
        # attribute '_recursion_count'": its binary and the standard library do not match.
        note="Triton joins rows of one length alone; the graph runs in its Python instances.",
    ),
    Peer(
        name="infinity",
        title="Infinity",
        command=infinity,
        formats={"text": [TextJson(PREDICT)]},
        environment="infinity",
        requirements=("infinity-emb[server]",),
        note="Infinity takes texts alone.",
    ),
)


def python_of_bench() -> Path:
    """The interpreter that runs the bench: evalmode and plain FastAPI use its environment."""
    return Path(sys.executable)
