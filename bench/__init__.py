"""The benchmark harness: TTFT, ITL and goodput of any OpenAI-compatible endpoint.

options.py   the flags of `pdserve bench serve`, checked once into a frozen Options
datasets.py  samples: random token ids, JSONL prompts, Mooncake traces
tokenizer.py a model directory's tokenizer.json: vocabulary, and text for chat
load.py      when each request is due, and the loop that sends it then
sse.py       bytes to events
stream.py    events to token arrivals, and the contract that makes an answer count
client.py    one request over HTTP
records.py   what is kept of one request
metrics.py   records to numbers; the definitions live here
paired.py    two servers in turn
progress.py  the live line
report.py    numbers to tables and JSON
serve.py     the run, from flags to report
cli.py       `pdserve bench …`
"""
