"""The expectation-gap audit: whether a site's training returns, on average, what its eval returns.

`audit.py` is the entry point. It calls the rest in this order:

* Finding: `find_sites.py`, `call.py` (a captured call), `direct_calls.py` (the calls of a module).
* Deciding: `judge.py` and `judge_training.py` (the order of decisions), `verdicts.py` (the names
  and sentences of the kinds), `site.py` (the records).
* Measuring: `isolated_site.py` runs a site; `by_tape.py`, `by_output.py` and `skipped_layers.py`
  observe its noise; `measure.py` and `agreement.py` test it.
* Following noise: `noise_tape.py`, `tensor_roles.py`, `balance.py`, `masks.py`, `augmentation.py`.
* Around the sites: `surrounding_code.py`, `code_runner.py`, `batchnorm.py`.
"""
