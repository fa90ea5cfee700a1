"""The NVTabular engine: a Workflow on pandas, or on cuDF where there is a GPU, behind a fence.

`plan` names the columns, `prepare` writes the rows that NVTabular reads, `operators` and `workflow` are the graph,
`library` alone imports NVTabular and Dask, `cluster` says where it runs, `coded` reads what it wrote, and `engine`
makes a dataset folder of it. docs/etl.md lists what NVTabular does wrong by itself and what is done about it.
"""
