"""Public test tools: check a model family, an adapter or a runtime against an independent oracle.

* ``models``: random weights for a small model; ``sizes``, ``tokenizer``: of a tiny decoder.
* ``inputs``: random prompts by a family's processor: left-padded batches, text before and after the image.
* ``processors``: drawn images and videos for it.
* ``naive``: the divergence of a strategy by whole forwards, for the engine to agree with.
* ``reference``: the masked dense reference, plain transformers plus hooks; it skips nothing and hides everything.
* ``strategies``: Hypothesis generators of strategies and rankings.
* ``conformance``: a pytest class to subclass; the last step of adding a model family.

Nothing is imported here, so that using one of them does not need what another one needs.
"""
