"""The Auto classes in a process that imports the package, and after it is unregistered."""

import subprocess
import sys


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_registered_and_given_back():
    out = run(
        "import deepseek_v3\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "tiny = dict(hidden_size=32, num_hidden_layers=2, vocab_size=64)\n"
        "def of(t):\n"
        "    try: return type(AutoConfig.for_model(t)).__module__.split('.')[0]\n"
        "    except ValueError: return 'unknown'\n"
        "print(of('deepseek_v3'), of('kimi_k2'))\n"
        "deepseek_v3.unregister()\n"
        "print(of('deepseek_v3'), of('kimi_k2'))\n"
        "deepseek_v3.register()\n"
        "print(of('deepseek_v3'), of('kimi_k2'))\n"
    )
    assert out == ["deepseek_v3", "deepseek_v3", "transformers", "unknown", "deepseek_v3", "deepseek_v3"]


def test_import_pulls_in_no_optional_package_that_transformers_does_not():
    out = run(
        "import sys\n"
        "from transformers.models.deepseek_v3 import modeling_deepseek_v3\n"
        "optional = ('triton', 'bitsandbytes', 'flash_attn', 'deep_gemm', 'peft', 'datasets', 'matplotlib')\n"
        "before = {name for name in optional if name in sys.modules}\n"
        "import deepseek_v3\n"
        "print(*[name for name in optional if name in sys.modules and name not in before])"
    )
    assert out == []
