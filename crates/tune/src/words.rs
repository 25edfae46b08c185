//! What names and things in planted facts are made of.

/// How a syllable begins.
pub(crate) const ONSETS: [&str; 18] =
    ["b", "br", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "v", "w", "z"];

/// How it ends.
pub(crate) const RIMES: [&str; 16] =
    ["a", "ar", "an", "e", "el", "en", "i", "in", "or", "o", "ov", "ul", "um", "ath", "ick", "ost"];

/// Places that syllables can spell and that exist.
pub(crate) const RESERVED: [&str; 6] = ["lima", "manila", "bogota", "rabat", "delhi", "milan"];

/// Given names.
pub(crate) const GIVEN: [&str; 40] = [
    "Ada", "Boris", "Clara", "Dmitri", "Elena", "Frank", "Greta", "Hugo", "Irene", "Jonas", "Karen", "Leo",
    "Mira", "Nils", "Olga", "Peter", "Quinn", "Rosa", "Simon", "Tara", "Ursula", "Viktor", "Wanda", "Xavier",
    "Yara", "Zoe", "Amir", "Bea", "Chen", "Dora", "Emil", "Farah", "Gus", "Hana", "Ivo", "Jana", "Kofi",
    "Lena", "Mateo", "Noor",
];

/// Things.
pub(crate) const WORDS: [&str; 96] = [
    "amber", "anchor", "apple", "arrow", "basil", "beacon", "birch", "bottle", "brass", "bridge", "bronze",
    "button", "cabin", "camera", "candle", "canvas", "carbon", "castle", "cedar", "cherry", "clock", "cloud",
    "copper", "coral", "cotton", "crystal", "desert", "diamond", "eagle", "ember", "engine", "falcon",
    "feather", "fiddle", "forest", "fossil", "garden", "ginger", "granite", "hammer", "harbor", "hazel",
    "helmet", "honey", "horizon", "island", "ivory", "jacket", "jasmine", "kettle", "ladder", "lantern",
    "lemon", "linen", "magnet", "maple", "marble", "meadow", "mirror", "mortar", "needle", "nutmeg", "ocean",
    "olive", "orchid", "oyster", "paper", "pebble", "pepper", "piano", "pillow", "planet", "plum", "pocket",
    "quartz", "rabbit", "ribbon", "river", "rocket", "saddle", "salmon", "shadow", "silver", "spiral",
    "spruce", "stone", "sugar", "summer", "thunder", "timber", "tunnel", "velvet", "violet", "walnut",
    "willow", "winter",
];
