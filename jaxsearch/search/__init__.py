"""The stages of a search over a corpus: filter → retrieve → fuse → rank → shape.

`Bundle.search`, the server, evaluation and the mining of training candidates all run them. `filters` turns a filter
into a mask, `candidates` holds what retrieval found, `orders` puts it in order, `fitting` fits orders on graded queries
and chooses one, `requests` says what is asked and how it is planned, `searcher` runs the stages. No HTTP here, no
queue, no clock.
"""
