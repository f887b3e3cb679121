"""Where two tokenizers agree on a text: after which bytes both models predict the same next text.

python docs/examples/compare_tokenizers.py PIVOT SOURCE "some text"
"""

import sys
from pathlib import Path

from fusechat.bytetable import ByteTable, token_byte_ends
from fusechat.tokenizer import load_tokenizer

pivot, source, text = sys.argv[1:]
ends = {}
for name in (pivot, source):
    tokenizer = load_tokenizer(Path(name))
    table = ByteTable.from_tokenizer(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    ends[name] = token_byte_ends(table, ids, text.encode()).tolist()
    pieces = [text.encode()[a:b].decode(errors="replace") for a, b in zip([0, *ends[name]], ends[name])]
    print(f"{name}: {len(pieces)} tokens\n  {'|'.join(pieces)}")
shared = set(ends[pivot]) & set(ends[source])
print(f"{len(shared)} of the pivot's {len(ends[pivot])} tokens end where a token of the source ends")
