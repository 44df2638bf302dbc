"""A model's folder that ships its gates is served without being told."""

import json
import shutil

from vllm import LLM

from seerattention.measure import bundled
from tests.vllm.engines import Alone, answers, served_by, texts


def test_a_model_that_names_its_gates(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(bundled.TEACHER, model)
    shutil.copytree(bundled.GATES, model / "gates")
    config = json.loads((model / "config.json").read_text())
    config["seerattention"] = {"gates": "gates", "policy": "top_k:0.3", "min_tokens": 0}
    (model / "config.json").write_text(json.dumps(config))
    llm = LLM(str(model), dtype="float32", enforce_eager=True, max_model_len=2048, num_gpu_blocks_override=64)
    prompts = texts(1500, 777, begin=20000)
    assert answers(llm, prompts) == Alone().answers(prompts)[0]
    assert served_by(llm).layer.usage["sparse"]
