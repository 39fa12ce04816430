from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from evalmode.bundle.errors import BundleCorrupt, InputsRefused, ModelRunFailed, ProviderUnavailable
from evalmode.bundle.session import open_session

WEIGHTS = np.random.default_rng(5).standard_normal((64, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> bytes:
    """y = x @ w, for any number of rows."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 32])],
        [numpy_helper.from_array(WEIGHTS, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString()


def test_a_model_is_opened_from_bytes_and_from_a_path_alike(model, tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(model)
    inputs = {"x": np.ones((2, 64), np.float32)}
    from_bytes, from_path = (open_session(source).run(inputs)["y"] for source in (model, file))
    assert from_bytes.tobytes() == from_path.tobytes()
    assert np.allclose(from_bytes, inputs["x"] @ WEIGHTS, atol=1e-5)


@pytest.mark.parametrize(
    "inputs", [{}, {"z": np.ones((2, 64), np.float32)}, {"x": np.ones((2, 63), np.float32)}]
)
def test_inputs_that_the_model_does_not_take_are_refused_in_a_sentence(model, inputs):
    with pytest.raises(InputsRefused, match="ONNX Runtime cannot run the model on these inputs: "):
        open_session(model).run(inputs)


def one_node(op, *, inputs, weights):
    """A model with one node, whose output may have any shape."""
    graph = helper.make_graph(
        [helper.make_node(op, [*inputs, *weights], ["y"])],
        "one node",
        [
            helper.make_tensor_value_info(name, kind, shape)
            for name, (kind, shape) in inputs.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    ).SerializeToString()


FLOATS = (TensorProto.FLOAT, ["n", "k"])


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (
            one_node("MatMul", inputs={"x": FLOATS}, weights={"w": np.ones((4, 2), np.float32)}),
            {"x": np.ones((2, 3), np.float32)},
        ),
        (
            one_node("Reshape", inputs={"x": FLOATS}, weights={"s": np.array([0, 4, -1])}),
            {"x": np.ones((2, 3), np.float32)},
        ),
        (
            one_node("Add", inputs={"a": FLOATS, "b": FLOATS}, weights={}),
            {"a": np.ones((2, 3), np.float32), "b": np.ones((2, 2), np.float32)},
        ),
    ],
)
def test_shapes_that_clash_are_refused_inputs(model, inputs):
    with pytest.raises(InputsRefused, match="while running"):
        open_session(model).run(inputs)


def test_a_lack_of_memory_is_a_failed_run_and_not_refused_inputs():
    model = one_node(
        "Expand",
        inputs={"x": (TensorProto.FLOAT, [1])},
        weights={"s": np.array([10**6, 10**7, 10**3])},
    )
    with pytest.raises(ModelRunFailed, match="memory") as failure:
        open_session(model).run({"x": np.ones(1, np.float32)})
    assert not isinstance(failure.value, InputsRefused)


def test_a_session_lists_its_tensors_with_minus_one_for_axes_that_vary(model):
    session = open_session(model)
    assert [(spec.name, spec.datatype, spec.shape) for spec in session.inputs] == [
        ("x", "FP32", (-1, 64))
    ]
    assert [(spec.name, spec.datatype, spec.shape) for spec in session.outputs] == [
        ("y", "FP32", (-1, 32))
    ]


def test_a_session_describes_the_platform_that_its_bits_depend_on(model):
    platform = open_session(model, threads=2).platform
    assert platform.runtime == f"onnxruntime {onnxruntime.__version__}"
    assert platform.provider == "CPUExecutionProvider"
    assert platform.threads == 2
    assert platform.cpu_features == tuple(sorted(platform.cpu_features))
    assert platform != open_session(model, threads=1).platform


@pytest.mark.parametrize("name", ["cpu", "CPU", "CPUExecutionProvider"])
def test_a_provider_may_be_named_in_short_or_by_its_full_name(model, name):
    assert open_session(model, provider=name).provider == "CPUExecutionProvider"


@pytest.mark.parametrize("name", ["cuda", "tensorrt", "nonsense", ""])
def test_an_unavailable_provider_is_refused_with_a_list_of_those_available(model, name):
    if f"{name.upper()}ExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("it is there")
    with pytest.raises(ProviderUnavailable, match=rf"'{name}' is not available here.*offers:.*cpu"):
        open_session(model, provider=name)


@pytest.mark.parametrize("garbage", [b"", b"garbage", b"\x08\x0a" * 100])
def test_an_unreadable_model_is_refused_with_its_name(garbage):
    with pytest.raises(BundleCorrupt, match=r"model\.onnx cannot be opened"):
        open_session(garbage)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BundleCorrupt, match=r"model\.onnx cannot be opened"):
        open_session(tmp_path / "nothing.onnx")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("optimisation", ["off", "basic", "extended", "all"])
def test_many_threads_on_one_session_get_the_bits_of_one(model, threads, optimisation):
    session = open_session(model, threads=threads, optimisation=optimisation)
    random = np.random.default_rng(9)
    requests = [
        {"x": random.standard_normal((rows, 64)).astype(np.float32)} for rows in (1, 2, 7, 16) * 20
    ]
    expected = [session.run(inputs)["y"].tobytes() for inputs in requests]
    with ThreadPoolExecutor(8) as pool:
        assert [outputs["y"].tobytes() for outputs in pool.map(session.run, requests)] == expected


def distribution(folder: Path, name: str) -> None:
    """The metadata that pip writes for an installed distribution."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")


PROGRAM = """
import json, sys
from evalmode.bundle.errors import ProviderUnavailable
from evalmode.bundle.session import open_session
{before}
try:
    open_session(b"")
except ProviderUnavailable as error:
    print(json.dumps([str(error), "onnxruntime.capi" in sys.modules]))
"""


def sentence(*, path: Path, before: str = "") -> str:
    """The error of a new process with these distributions, which has not loaded ONNX Runtime."""
    program = f"import sys; sys.path.insert(0, {str(path)!r})\n" + PROGRAM.format(before=before)
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    message, loaded = json.loads(ended.stdout)
    assert not loaded
    return message


def test_two_distributions_of_onnx_runtime_are_refused_with_the_remedy(tmp_path):
    distribution(tmp_path, "onnxruntime")
    distribution(tmp_path, "onnxruntime-gpu")
    message = sentence(path=tmp_path)
    assert "are both installed" in message
    assert "pip uninstall onnxruntime onnxruntime-gpu" in message


def test_a_missing_onnx_runtime_is_refused_with_the_remedy(tmp_path):
    message = sentence(
        path=tmp_path,
        before="sys.modules['onnxruntime'] = None  # the import system then finds no such module",
    )
    assert "ONNX Runtime is not installed" in message
    assert "evalmode[cpu]" in message
    assert "evalmode[gpu]" in message


def test_opening_a_session_tells_onnx_runtime_to_write_no_telemetry(model, tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from evalmode.bundle.session import"
        " open_session;open_session(Path(sys.argv[1])); print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    file = tmp_path / "model.onnx"
    file.write_bytes(model)
    ended = subprocess.run(
        [sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == "1"


def test_a_plugin_without_a_device_is_refused_and_says_so(model, tmp_path):
    package = tmp_path / "onnxruntime_ep_openvino"
    package.mkdir()
    # What the package of a plugin has; its library is a file that is no library.
    (package / "__init__.py").write_text(
        "def get_library_path(): return __file__\n"
        "def get_ep_name(): return 'OpenVINOExecutionProvider'\n"
    )
    distribution(tmp_path, "onnxruntime_ep_openvino")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from evalmode.bundle.errors import ProviderUnavailable\n"
        "from evalmode.bundle.session import open_session\n"
        "try:\n    open_session(b'', provider='openvino')\n"
        "except ProviderUnavailable as error:\n    print(error)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "'openvino' is installed as a plugin and finds no device here" in process.stdout
    assert process.stdout.rstrip().endswith("cpu")
