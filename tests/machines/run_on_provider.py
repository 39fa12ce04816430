"""In another environment: run the known answers of a bundle on a provider, and print JSON.

    python run_on_provider.py BUNDLE PROVIDER

"differing" counts the answers with other bits than those in the bundle, and "operators" lists for
each provider the operators that it ran. "float_operators_on_cpu" are those with a floating-point
output that ran on the CPU although another provider was chosen.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from evalmode.bundle.known_answers import bits
from evalmode.bundle.providers import CPU, choose_provider, import_onnxruntime
from evalmode.bundle.store import open_bundle

# ONNX Runtime's names in a profile.
FLOAT_TYPES = {"float", "double", "float16", "bfloat16"}


def main() -> None:
    bundle = open_bundle(Path(sys.argv[1]))
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    choice = choose_provider(options, sys.argv[2])
    answers = bundle.known_answers()
    differing = 0
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        session = ort.InferenceSession(bundle.model, options, providers=choice.providers)
        for answer in answers:
            inputs = {tensor.name: answer.inputs[tensor.name] for tensor in session.get_inputs()}
            outputs = dict(zip(answer.outputs, session.run([*answer.outputs], inputs), strict=True))
            differing += any(bits(outputs[name]) != bits(answer.outputs[name]) for name in outputs)
        events = json.loads(Path(session.end_profiling()).read_text())

    operators: dict[str, set[str]] = {}
    float_operators_on_cpu = set()
    for event in events:
        details = event.get("args", {})
        if "op_name" not in details or "provider" not in details:
            continue
        operators.setdefault(details["provider"], set()).add(details["op_name"])
        output_types = {kind for output in details["output_type_shape"] for kind in output}
        if details["provider"] == CPU and output_types & FLOAT_TYPES:
            float_operators_on_cpu.add(details["op_name"])
    report = {
        "runtime": ort.__version__,
        "provider": session.get_providers()[0],
        "answers": len(answers),
        "differing": differing,
        "operators": {name: sorted(names) for name, names in operators.items()},
        "float_operators_on_cpu": sorted(float_operators_on_cpu),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
