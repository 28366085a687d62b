"""The stages of a search over a corpus: filter → retrieve → fuse → rank → shape.

`Bundle.search`, the server, evaluation and the mining of training candidates all run them; none has a copy. `filters`
turns a filter into a mask, `candidates` holds what retrieval found, `orders` puts it in order, `fitting` fits orders on
graded queries and chooses one, `searcher` runs the stages. No HTTP here, no queue, no clock.
"""
