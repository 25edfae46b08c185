//! What operators read about memory and waiting, to the byte and the sequence.

use super::*;

use locket_model::kv_cache::{CachePlan, SideArrays};

/// Sum and count of a histogram.
fn histogram(registry: &prometheus::Registry, name: &str) -> (f64, u64) {
    let families = registry.gather();
    let family = families.iter().find(|family| family.name() == name).expect("a series");
    let histogram = family.get_metric()[0].get_histogram();
    (histogram.get_sample_sum(), histogram.get_sample_count())
}

#[test]
fn memory_is_told_beside_what_a_full_cache_would_take() {
    let mut bench = Bench::new(&[(32, 2), (64, 2)], config());
    let plan = bench.handle.facts().cache.clone();
    let block = |slots| CachePlan::block_bytes(plan.geometry, plan.slot_type, plan.side, slots) as f64;
    let slot = CachePlan::slot_bytes(plan.geometry, plan.slot_type, plan.side) as f64;
    let full_slot = CachePlan::slot_bytes(plan.geometry, plan.slot_type, SideArrays::default()) as f64;
    let gauge = |bench: &Bench, name, state| metric(&bench.registry, name, state);
    assert_eq!(gauge(&bench, "locket_cache_bytes", Some("total")), plan.total_bytes() as f64);
    let folding = GenerationRequest { cache: window(24, 8), ..request(60, 30) };
    let stream = bench.handle.submit(folding.clone()).unwrap().pop();
    while gauge(&bench, "locket_full_cache_bytes", None) < 60.0 * full_slot {
        assert_eq!(bench.engine.turn(), Turn::Worked);
    }
    assert_eq!(gauge(&bench, "locket_full_cache_bytes", None), 60.0 * full_slot);
    assert_eq!(gauge(&bench, "locket_cache_bytes", Some("reserved")), block(32));
    assert_eq!(gauge(&bench, "locket_cache_bytes", Some("used")), 32.0 * slot);
    finish(&mut bench, &mut [Reader { stream, request: folding, choice: 0, events: Vec::new() }]);
    assert_eq!(gauge(&bench, "locket_full_cache_bytes", None), 0.0);
    assert_eq!(gauge(&bench, "locket_cache_bytes", Some("reserved")), 0.0);
    assert_eq!(histogram(&bench.registry, "locket_sequence_cache_bytes"), (block(32), 1));
    // The last token is sampled and never run.
    assert_eq!(histogram(&bench.registry, "locket_sequence_full_cache_bytes"), (89.0 * full_slot, 1));
    bench.assert_empty();
}

#[test]
fn those_who_wait_are_told_by_what_they_wait_for() {
    let waiting = |bench: &Bench, reason| metric(&bench.registry, "locket_waiting_sequences", Some(reason));
    let vllms =
        |bench: &Bench, reason| metric(&bench.registry, "vllm:num_requests_waiting_by_reason", Some(reason));
    for (max_running, reason, other) in [(16, "block", "running_limit"), (2, "running_limit", "block")] {
        let mut bench = Bench::new(&[(64, 2)], EngineConfig { max_running, ..config() });
        let streams: Vec<_> =
            (0..5).map(|_| bench.handle.submit(request(20, 30)).unwrap().pop().unwrap()).collect();
        assert_eq!(bench.engine.turn(), Turn::Worked);
        assert_eq!((waiting(&bench, reason), waiting(&bench, other)), (3.0, 0.0));
        assert_eq!((vllms(&bench, "capacity"), vllms(&bench, "deferred")), (3.0, 0.0));
        bench.clock.advance(Duration::from_secs(2));
        assert_eq!(bench.engine.turn(), Turn::Worked);
        assert!(metric(&bench.registry, "locket_queue_oldest_seconds", None) >= 2.0);
        drop(streams);
        bench.run_until_idle();
        assert_eq!(waiting(&bench, reason), 0.0);
        assert_eq!(metric(&bench.registry, "locket_queue_oldest_seconds", None), 0.0);
    }
}

#[test]
fn prompt_tokens_are_told_by_where_they_came_from() {
    let snapshots = EngineConfig { snapshot_memory_bytes: 1 << 20, snapshot_interval: 16, ..config() };
    let mut bench = Bench::new(&[(64, 2)], snapshots);
    for _ in 0..2 {
        let request = request(40, 4);
        let stream = bench.handle.submit(request.clone()).unwrap().pop();
        finish(&mut bench, &mut [Reader { stream, request, choice: 0, events: Vec::new() }]);
    }
    let source = |name| metric(&bench.registry, "vllm:prompt_tokens_by_source_total", Some(name));
    let cached = metric(&bench.registry, "vllm:prompt_tokens_cached_total", None);
    assert_eq!(cached, metric(&bench.registry, "vllm:prefix_cache_hits_total", None));
    assert!(cached >= 32.0, "the second prompt goes on from a snapshot");
    assert_eq!(source("local_cache_hit"), cached);
    assert_eq!(source("local_compute"), 80.0 - cached);
    let computed = histogram(&bench.registry, "vllm:request_prefill_kv_computed_tokens");
    assert_eq!(computed, (80.0 - cached, 2));
}
