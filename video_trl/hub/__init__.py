"""
Publish weights and datasets: LoRA files for diffusers and for other tools, model and dataset cards, uploads.
"""

from .card import CARD_NAME, DatasetFacts, Measurement, add_evaluation, model_card
from .dataset import dataset_card, export_dataset, push_dataset
from .export import export_lora
from .lora import LORA_FILE_NAME, check_lora_config, load_lora_state, save_lora
from .merge import merge_adapter
from .published import import_lora, read_adapter
from .upload import HubUploadError, inherited_license, push


__all__ = [
    "CARD_NAME",
    "LORA_FILE_NAME",
    "DatasetFacts",
    "HubUploadError",
    "Measurement",
    "add_evaluation",
    "check_lora_config",
    "dataset_card",
    "export_dataset",
    "export_lora",
    "import_lora",
    "inherited_license",
    "load_lora_state",
    "merge_adapter",
    "model_card",
    "push",
    "push_dataset",
    "read_adapter",
    "save_lora",
]
