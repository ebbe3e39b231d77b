"""What lmms-eval reads when it starts, so it imports nothing of ours: see :mod:`vlm.evaluation.lmms`."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest("vlm_recipe", simple_class_path="vlm.evaluation.lmms.RecipeModel")
