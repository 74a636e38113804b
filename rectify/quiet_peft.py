"""What is used of peft, which would import bitsandbytes; see `rectify.quiet`."""

from rectify.quiet import without_bitsandbytes

with without_bitsandbytes():
    from peft import (
        LoraConfig,
        PeftConfig,
        PeftMixedModel,
        PeftModel,
        TaskType,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

__all__ = [
    "BaseTunerLayer",
    "LoraConfig",
    "LoraLayer",
    "ModulesToSaveWrapper",
    "PeftConfig",
    "PeftMixedModel",
    "PeftModel",
    "TaskType",
    "get_peft_model",
    "get_peft_model_state_dict",
    "set_peft_model_state_dict",
]
