"""What the entry point ``lmms_eval.models`` points to: ``lmms-eval --model dop`` works once dop-search is installed."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFESTS = [
    ModelManifest(
        model_id="dop",
        simple_class_path="dop_search.baselines.lmms.DopLmms",
        chat_class_path="dop_search.baselines.lmms.DopChatLmms",
    )
]
