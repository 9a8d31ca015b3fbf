"""Fine-tune a patched LLaVA: LoRA on its language model, its projector in full.

python examples/finetune_llava_lora.py                 # a tiny random model, on any machine
python examples/finetune_llava_lora.py --model llava-hf/llava-1.5-7b-hf --lr 2e-4 --steps 1000 \
    --data conversations.json --images pictures/       # yours, in LLaVA's conversation JSON
"""

import argparse

import torch
import toy_models
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import vlm_fast


def main() -> Trainer:
    parser = argparse.ArgumentParser()
    for name in ("model", "data", "images"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--output", default="llava-lora")
    chosen = parser.parse_args()
    model, examples, collator = toy_models.llava(chosen.model, chosen.data, chosen.images)

    # Patch before wrapping: PEFT trains a copy of the projector, which must be the patched one.
    print(vlm_fast.patch(model))
    lora = LoraConfig(
        r=16, lora_alpha=32, target_modules=r".*language_model.*\.[qkvo]_proj",
        modules_to_save=["multi_modal_projector"],
    )  # fmt: skip
    model = get_peft_model(model, lora)
    model.print_trainable_parameters()

    settings = TrainingArguments(
        chosen.output, max_steps=chosen.steps, learning_rate=chosen.lr,
        per_device_train_batch_size=8, bf16=torch.cuda.is_available(), logging_steps=5,
        save_strategy="no", report_to="none", remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=examples, data_collator=collator)
    trainer.train()

    # This saves adapter and projector; PEFT can load them without vlm_fast.
    model.save_pretrained(chosen.output)
    for name, reason in vlm_fast.explain(model).items():
        print(f"{name}: {reason or 'fused'}")
    return trainer


if __name__ == "__main__":
    main()
