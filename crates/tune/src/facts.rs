//! Planted facts and questions about them, made on the fly: they teach the scorer what will be asked for.
//!
//! Names and places are built of syllables or taken from short lists of ordinary words, so that none of
//! them is a fact that a model knows. Evaluation has templates of its own; none of its phrases is here.

use rand::{Rng as _, rngs::StdRng, seq::IndexedRandom as _};

use crate::words::{GIVEN, ONSETS, RESERVED, RIMES, WORDS};

/// A statement to plant, and how to ask for a part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fact {
    pub statement: String,
    /// Text that the answer follows at once.
    pub question: String,
    /// Usually begins with a blank.
    pub answer: String,
}

/// Number of kinds of facts.
const FAMILIES: usize = 14;

/// `count` facts in random order. One time in four all are of one kind, so that only the right name
/// leads to the right answer.
pub(crate) fn facts(count: usize, random: &mut StdRng) -> Vec<Fact> {
    let only = random.random_bool(0.25).then(|| random.random_range(0..FAMILIES));
    let make = |_| {
        let family = only.unwrap_or_else(|| random.random_range(0..FAMILIES));
        Maker { random: &mut *random }.fact(family)
    };
    (0..count).map(make).collect()
}

struct Maker<'a> {
    random: &'a mut StdRng,
}

impl Maker<'_> {
    fn pick<'b>(&mut self, of: &[&'b str]) -> &'b str {
        of.choose(self.random).copied().unwrap_or_default()
    }

    fn digits(&mut self, count: usize) -> String {
        let mut digit = |first| char::from(b'0' + self.random.random_range(first..10));
        (0..count).map(|at| digit(u8::from(at == 0))).collect()
    }

    /// A number of 3 to 8 digits.
    fn number(&mut self) -> String {
        let count = self.random.random_range(3..=8);
        self.digits(count)
    }

    /// An invented proper name of two or three syllables.
    fn name(&mut self) -> String {
        let syllables = self.random.random_range(2..=3);
        let lower: String =
            (0..syllables).map(|_| format!("{}{}", self.pick(&ONSETS), self.pick(&RIMES))).collect();
        // A few real places can come out of it; evaluations like to ask for those.
        let lower = if RESERVED.contains(&lower.as_str()) { lower + "wick" } else { lower };
        let mut letters = lower.chars();
        letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
    }

    /// Given name and surname.
    fn person(&mut self) -> String {
        format!("{} {}", self.pick(&GIVEN), self.name())
    }

    fn word(&mut self) -> &'static str {
        self.pick(&WORDS)
    }

    /// Letters and digits such as `KT-4821-B`.
    fn code(&mut self) -> String {
        let mut letter = || char::from(b'A' + self.random.random_range(0..26));
        let (a, b, c) = (letter(), letter(), letter());
        let count = self.random.random_range(3..=5);
        match self.random.random_range(0..3) {
            0 => format!("{a}{b}-{}-{c}", self.digits(count)),
            1 => format!("{a}{}{b}{c}", self.digits(count)),
            _ => format!("{}{a}{b}", self.digits(count)),
        }
    }

    fn identifier(&mut self) -> String {
        format!("{}_{}", self.word(), self.word())
    }

    fn value(&mut self) -> String {
        match self.random.random_range(0..3) {
            0 => self.code(),
            1 => self.word().to_owned(),
            _ => self.number(),
        }
    }

    fn fact(&mut self, family: usize) -> Fact {
        match family {
            0 => self.belonging(),
            1 => self.key_value(),
            2 => self.table_row(),
            3 => self.log_line(),
            4 => self.object_code(),
            5 => self.hiding_place(),
            6 => self.saying(),
            7 => self.purchase(),
            8 => self.meeting(),
            9 => self.constant(),
            10 => self.address(),
            11 => self.schedule(),
            12 => self.definition(),
            _ => self.measure(),
        }
    }

    /// "X's locker is N".
    fn belonging(&mut self) -> Fact {
        let (person, number) = (self.person(), self.number());
        let thing = self.pick(&[
            "password",
            "phone extension",
            "locker",
            "badge number",
            "account number",
            "library card",
            "PIN",
            "ticket number",
            "room",
            "membership number",
        ]);
        let statement = match self.random.random_range(0..4) {
            0 => format!("{person}'s {thing} is {number}."),
            1 => format!("The {thing} of {person} is {number}."),
            2 => format!("Please note that {number} is {person}'s {thing}."),
            _ => format!("{person} was given a new {thing}, {number}, this morning."),
        };
        let question = match self.random.random_range(0..4) {
            0 => format!("{person}'s {thing} is"),
            1 => format!("What is {person}'s {thing}? It is"),
            2 => format!("Q: What is the {thing} of {person}?\nA:"),
            _ => format!("The {thing} of {person} is"),
        };
        Fact { statement, question, answer: format!(" {number}") }
    }

    /// `a_b = value`, in several notations.
    fn key_value(&mut self) -> Fact {
        let (key, value) = (self.identifier(), self.value());
        let statement = match self.random.random_range(0..4) {
            0 => format!("{key} = {value}"),
            1 => format!("{key}: {value}"),
            2 => format!("export {key}={value}"),
            _ => format!("\"{key}\": \"{value}\","),
        };
        let question = match self.random.random_range(0..3) {
            0 => format!("{key} ="),
            1 => format!("The value of {key} is"),
            _ => format!("What is {key} set to? Answer:"),
        };
        Fact { statement, question, answer: format!(" {value}") }
    }

    fn table_row(&mut self) -> Fact {
        let (item, price, stock) = (self.identifier().replace('_', " "), self.number(), self.number());
        let statement = match self.random.random_range(0..3) {
            0 => format!("| {item} | {price} | {stock} |"),
            1 => format!("{item}\t{price}\t{stock}"),
            _ => format!("{item}; price {price}; stock {stock}"),
        };
        match self.random.random_range(0..2) {
            0 => {
                let question = format!("In the table, the first figure for {item} is");
                Fact { statement, question, answer: format!(" {price}") }
            }
            _ => {
                let question = format!("Row of {item}: | {item} | {price} |");
                Fact { statement, question, answer: format!(" {stock}") }
            }
        }
    }

    fn log_line(&mut self) -> Fact {
        let (service, job, code) = (self.word(), self.number(), self.value());
        let (hour, minute) = (self.random.random_range(0..24), self.random.random_range(0..60));
        let statement = match self.random.random_range(0..3) {
            0 => format!("{hour:02}:{minute:02} WARN {service}: job {job} ended with status {code}"),
            1 => format!("[{service}] {hour:02}:{minute:02} job={job} status={code}"),
            _ => format!("INFO {service} - job {job} returned {code}"),
        };
        let question = match self.random.random_range(0..2) {
            0 => format!("The status of {service} job {job} was"),
            _ => format!("Q: With what did job {job} of {service} end?\nA:"),
        };
        Fact { statement, question, answer: format!(" {code}") }
    }

    fn object_code(&mut self) -> Fact {
        let (a, b, code) = (self.word(), self.word(), self.code());
        let statement = match self.random.random_range(0..3) {
            0 => format!("Note: the {a} code for the {b} door is {code}."),
            1 => format!("To open the {b} door, type {code} on the {a} panel."),
            _ => format!("The {a} panel of the {b} door accepts {code} only."),
        };
        let question = match self.random.random_range(0..2) {
            0 => format!("The {b} door is opened on the {a} panel with"),
            _ => format!("What is the {a} code for the {b} door? It is"),
        };
        Fact { statement, question, answer: format!(" {code}") }
    }

    fn hiding_place(&mut self) -> Fact {
        let (person, thing, place) = (self.person(), self.word(), self.word());
        let container = self.pick(&["box", "drawer", "basket", "cupboard", "jar", "chest"]);
        let statement = match self.random.random_range(0..2) {
            0 => format!("{person} keeps the {thing} inside the {place} {container}."),
            _ => format!("If you look for the {thing} of {person}, it is in the {place} {container}."),
        };
        let question = match self.random.random_range(0..2) {
            0 => format!("{person} keeps the {thing} in the"),
            _ => format!("Where is {person}'s {thing}? In the"),
        };
        Fact { statement, question, answer: format!(" {place} {container}") }
    }

    fn saying(&mut self) -> Fact {
        let (person, a, b) = (self.person(), self.word(), self.word());
        let statement = match self.random.random_range(0..2) {
            0 => format!("The favourite words of {person} are \"{a} {b}\"."),
            _ => format!("\"{a} {b}!\" said {person}, as always."),
        };
        let question = match self.random.random_range(0..2) {
            0 => format!("{person} always says \""),
            _ => format!("The favourite words of {person} are \""),
        };
        Fact { statement, question, answer: format!("{a} {b}\"") }
    }

    fn purchase(&mut self) -> Fact {
        let (person, invoice, thing) = (self.person(), self.number(), self.word());
        let statement = match self.random.random_range(0..2) {
            0 => format!("Invoice {invoice} for the {thing} was paid by {person}."),
            _ => format!("{person} bought a {thing} (invoice {invoice})."),
        };
        match self.random.random_range(0..2) {
            0 => {
                let question = format!("The person who paid invoice {invoice} is");
                Fact { statement, question, answer: format!(" {person}") }
            }
            _ => {
                let question = format!("The {thing} of {person} is on invoice");
                Fact { statement, question, answer: format!(" {invoice}") }
            }
        }
    }

    fn meeting(&mut self) -> Fact {
        let (a, b, place) = (self.person(), self.person(), self.word());
        let year = self.digits(4);
        let statement = format!("In the year {year}, {a} met {b} near the {place}.");
        match self.random.random_range(0..2) {
            0 => {
                let question = format!("The person that {a} met near the {place} is");
                Fact { statement, question, answer: format!(" {b}") }
            }
            _ => {
                let question = format!("When did {a} meet {b}? In the year");
                Fact { statement, question, answer: format!(" {year}") }
            }
        }
    }

    fn constant(&mut self) -> Fact {
        let (name, number) = (self.name().to_uppercase(), self.number());
        let statement = match self.random.random_range(0..4) {
            0 => format!("{name} = {number}"),
            1 => format!("#define {name} {number}"),
            2 => format!("const {name}: u32 = {number};"),
            _ => format!("let {name} be {number}."),
        };
        let question = match self.random.random_range(0..2) {
            0 => format!("{name} ="),
            _ => format!("{name} has the value"),
        };
        Fact { statement, question, answer: format!(" {number}") }
    }

    fn address(&mut self) -> Fact {
        let (person, street, town) = (self.person(), self.name(), self.name());
        let house = self.digits(3);
        let statement = match self.random.random_range(0..2) {
            0 => format!("{person} lives at {house} {street} Street in {town}."),
            _ => format!("Send it to {person}, {house} {street} Street, {town}."),
        };
        let question = match self.random.random_range(0..2) {
            0 => format!("The address of {person} is"),
            _ => format!("Q: Where does {person} live?\nA: At"),
        };
        Fact { statement, question, answer: format!(" {house} {street} Street") }
    }

    fn schedule(&mut self) -> Fact {
        let (name, platform) = (self.name(), self.random.random_range(2..40));
        let (hour, minute) = (self.random.random_range(0..24), self.random.random_range(0..60));
        let statement = match self.random.random_range(0..2) {
            0 => format!("The train to {name} leaves at {hour:02}:{minute:02} from platform {platform}."),
            _ => format!("{hour:02}:{minute:02} {name} platform {platform}"),
        };
        let question = format!("The train to {name} leaves at");
        Fact { statement, question, answer: format!(" {hour:02}:{minute:02}") }
    }

    fn definition(&mut self) -> Fact {
        let (term, a, b) = (self.name().to_lowercase(), self.word(), self.word());
        let statement = match self.random.random_range(0..2) {
            0 => format!("In the local dialect, \"{term}\" means {a} {b}."),
            _ => format!("{term} (noun): a {a} {b}."),
        };
        let (question, answer) = match (self.random.random_range(0..2), statement.contains("dialect")) {
            (0, true) => (format!("The word \"{term}\" means"), format!(" {a} {b}")),
            (_, true) => (format!("Q: What does {term} mean?\nA:"), format!(" {a} {b}")),
            (_, false) => (format!("A {term} is a"), format!(" {a} {b}")),
        };
        Fact { statement, question, answer }
    }

    fn measure(&mut self) -> Fact {
        let (place, number) = (self.name(), self.number());
        let (what, unit) = self.random_pair(&[
            ("height", "metres"),
            ("population", "people"),
            ("area", "acres"),
            ("age", "days"),
        ]);
        let statement = match self.random.random_range(0..2) {
            0 => format!("The {what} of {place} is {number} {unit}."),
            _ => format!("{place}: {what} {number} {unit}."),
        };
        let question = match self.random.random_range(0..2) {
            0 => format!("The {what} of {place} is"),
            _ => format!("What is the {what} of {place}? It is"),
        };
        Fact { statement, question, answer: format!(" {number} {unit}") }
    }

    fn random_pair(&mut self, of: &[(&'static str, &'static str)]) -> (&'static str, &'static str) {
        of.choose(self.random).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parameters::random;

    #[test]
    fn every_answer_is_in_its_statement_and_not_in_its_question() {
        for family in 0..FAMILIES {
            for at in 0..50 {
                let mut random = random(1, 2, at);
                let fact = Maker { random: &mut random }.fact(family);
                let Fact { statement, question, answer } = &fact;
                let bare = answer.trim().trim_end_matches('"');
                assert!(statement.contains(bare), "{fact:?}");
                // Letter by letter an answer of few digits may be part of a name's number: whole words.
                assert!(!format!("{question} ").contains(&format!("{answer} ")), "{fact:?}");
            }
        }
    }

    #[test]
    fn phrases_of_the_evaluation_do_not_occur() {
        let text: String = (0..400)
            .flat_map(|at| facts(6, &mut random(3, 2, at)))
            .map(|fact| format!("{} {}{} ", fact.statement, fact.question, fact.answer).to_lowercase())
            .collect();
        let reserved = [
            "pass key",
            "passkey",
            "magic number",
            "chicago",
            "lisbon",
            "nairobi",
            "oslo",
            "lima",
            "kyoto",
            "cairo",
            "prague",
            "quito",
            "dublin",
            "hanoi",
            "sofia",
            "warsaw",
            "bogota",
            "manila",
            "athens",
        ];
        for phrase in reserved {
            let words: String = text.chars().map(|c| if c.is_alphanumeric() { c } else { ' ' }).collect();
            assert!(!words.contains(&format!(" {phrase} ")), "{phrase}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_facts() {
        let of = |seed| facts(10, &mut random(seed, 2, 5));
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
    }
}
