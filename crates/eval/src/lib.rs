//! What a cache method costs: perplexity and recall at equal slots and at equal bytes.
