#!/usr/bin/env bash
# What has moved on the package index since CI last ran: bash scripts/newest.sh [requirement ...]
#
# Prints name, the exact pin of 3rdparty/constraints.txt, the newest version that setup.py allows and the newest that there
# is, for each direct dependency of which these differ. Exit code 0: none does. 1: some do. 2: the index does not answer.
set -euo pipefail
cd "$(dirname "$0")/.."

exec python3 - "$@" <<'PYTHON'
import ast
import re
import subprocess
import sys

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.version import Version

tree = ast.parse(open("setup.py", encoding="utf-8").read())
strings = [x.value for x in ast.walk(tree) if isinstance(x, ast.Constant) and isinstance(x.value, str)]
requirements: dict[str, Requirement] = {}
for text in strings:
    if re.fullmatch(r"[A-Za-z][\w.-]*(==|>=|<)[\w.,<>=]+", text):
        requirement = Requirement(text)
        known = requirements.setdefault(requirement.name, requirement)
        known.specifier &= requirement.specifier
lines = open("3rdparty/constraints.txt", encoding="utf-8").read().splitlines()
pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
normal = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}

moved = []
for name in sys.argv[1:] or sorted(requirements, key=str.lower):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", name], capture_output=True, text=True
    )
    found = re.search(r"Available versions: (.*)", done.stdout)
    if not found:
        print(f"{name}: {done.stderr.strip()[-200:]}", file=sys.stderr)
        sys.exit(2)
    versions = [Version(x) for x in found[1].split(", ")]
    allowed = max(v for v in versions if v in requirements[name].specifier)
    pin = normal.get(re.sub(r"[-_.]+", "-", name).lower())
    # a local tag, such as +cpu, is another build of the same version
    row = [pin, str(Version(allowed.public)), str(Version(max(versions).public))]
    if len(set(row)) > 1:
        moved.append([name, *map(str, row)])
for row in [["name", "pinned", "newest allowed", "newest"], *moved] if moved else []:
    print("{:24}{:14}{:18}{}".format(*row))
sys.exit(1 if moved else 0)
PYTHON
