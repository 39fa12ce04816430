"""The bundle: the artifact that export writes and the service opens.

store.py           bundles on disk: written completely or not at all, opened only when every byte
                   is the certified one
manifest.py        manifest.json: what a bundle declares
certificate.py     certificate.json: the verdict of every rule
known_answers.py   known_answers.npz: inputs with their outputs, replayed before a bundle serves
frontend.py        text to ids
session.py         the model in ONNX Runtime
row_counts.py      which batch sizes keep a row's bits
operators.py       whether a model can draw or train, read from its bytes by way of
                   operator_table.py, onnx_messages.py and wire.py

It imports neither torch nor onnx, and knows no HTTP.
"""
