"""Files of texts and labels: one module for each format. No type and no format is guessed.

table.py        opens a file in the format of its ending: start here
csv_tsv.py      CSV and TSV
json_lines.py   JSON lines
parquet.py      Parquet
source.py       opening files, decoding values, and the two columns that each format gives
"""
