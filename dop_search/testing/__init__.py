"""Public test tools: check a model family, an adapter or a runtime against an independent oracle.

* ``models``: tiny random models of every supported family, built from configs, nothing downloaded.
* ``inputs``: random inputs for them: left-padded batches, text before and after the image.
* ``processors``: the real processors of the families with a tiny tokenizer, rendered images and videos.
* ``naive``: the divergence of a strategy by whole forwards, for the engine to agree with.
* ``reference``: the masked dense reference, plain transformers plus hooks; it skips nothing and hides everything.
* ``strategies``: Hypothesis generators of strategies and rankings.
* ``conformance``: a pytest class to subclass; the last step of adding a model family.

Nothing is imported here, so that using one of them does not need what another one needs.
"""
