"""
A folder of colour emoji to train on, in which flags are sensitive: 220 of 1,656 in U, and 50 in S.

    npm pack emoji-datasource-twitter@16.0.0 && tar xf emoji-datasource-twitter-16.0.0.tgz
    python results/emoji.py package data/emoji

Graphics: Twemoji, copyright Twitter, Inc. and other contributors, licensed CC-BY 4.0.
"""
import json
import random
import shutil
import sys
from pathlib import Path

source, target = map(Path, sys.argv[1:])
emoji = json.loads((source / "emoji.json").read_text())
flags = [e["image"] for e in emoji if e["category"] == "Flags"]
others = [e["image"] for e in emoji if e["category"] not in ("Flags", "Component")]
rng = random.Random(0)
for names, n, part in [(flags, 50, "sensitive"), (others, 200, "normal_test")]:
    rng.shuffle(names)
    for i, name in enumerate(names):
        folder = target / (part if i < n else "unlabeled")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "img" / "twitter" / "64" / name, folder)
