"""What pytest-benchmark writes to its result file: the machine, the command and the statistics, not every single time."""

import os
import sys
from typing import Any

import torch


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    machine = output_json["machine_info"]
    cpu = machine["cpu"]
    output_json["machine_info"] = {
        "cpu": f"{cpu['brand_raw']}, {cpu['count']} cores, {torch.backends.cpu.get_cpu_capability()}",
        "system": machine["system"],
        "python": machine["python_version"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    output_json["command"] = " ".join(["python -m pytest", *(a for a in sys.argv[1:])]).replace(os.getcwd() + os.sep, "")
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
