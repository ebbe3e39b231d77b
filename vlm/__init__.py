"""One recipe trains, prunes, mitigates, evaluates and reports a vision-language model.

The folders ``models``, ``data`` and ``kernels`` beside this one import as ``vlm.models``, ``vlm.data`` and
``vlm.kernels`` through the three links in this folder.
"""

__version__ = "0.1.0"
