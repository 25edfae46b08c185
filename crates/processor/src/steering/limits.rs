//! What a constraint may cost. A source beyond a limit is refused before it is compiled; what
//! compiling or matching may cost is bounded by the grammar library's own counters.

use llguidance::api::ParserLimits;

/// Largest schema, as JSON text, in bytes.
pub(super) const MAX_SCHEMA_BYTES: usize = 256 << 10;

/// Deepest nesting of a schema's objects and arrays.
pub(super) const MAX_SCHEMA_DEPTH: usize = 64;

/// Longest regular expression in bytes, in a schema too.
pub(super) const MAX_REGEX_BYTES: usize = 16 << 10;

/// Longest Lark grammar in bytes.
pub(super) const MAX_LARK_BYTES: usize = 64 << 10;

/// Deepest nesting of brackets in a grammar or regular expression.
pub(super) const MAX_BRACKET_DEPTH: usize = 100;

/// Most choices, or alternatives of a composition.
pub(super) const MAX_CHOICES: usize = 4096;

/// All choices together, in bytes.
pub(super) const MAX_CHOICE_BYTES: usize = 256 << 10;

/// Stack of the thread that compiles: grammars are trees, and the compiler recurses.
pub(super) const COMPILER_STACK_BYTES: usize = 256 << 20;

/// Longest token, in bytes, that a grammar can allow; longer ones are left out.
pub(super) const MAX_TOKEN_BYTES: usize = 512;

/// Bounds of compiling and of each mask: some 20 ms and some 15 ms of work at most.
pub(super) fn parser_limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2_000,
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        // One to two kilobytes each, per request.
        max_lexer_states: 32_768,
        max_grammar_size: 500_000,
        precompute_large_lexemes: false,
        // The state would be the user's text in the log.
        verbose_errors: false,
    }
}
