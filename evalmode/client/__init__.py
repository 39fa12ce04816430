"""The client side of `evalmode predict --input`, and the check behind `evalmode healthcheck`.

transfer.py      reads a file of texts in chunks, answers several at once, and writes in order
remote.py        answers chunks with a server, over HTTP
local.py         answers chunks with a bundle in this process
answers_file.py  writes the file of answers, which a later run continues
readiness.py     asks a server whether it is ready
"""
