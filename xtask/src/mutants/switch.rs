//! Many faults in one build: the body of a function stands there once as it is, and once with each fault. Which one runs is
//! decided when the program starts, by an environment variable.

use std::ops::Range;

use syn::spanned::Spanned;
use syn::visit::{self, Visit};

use super::Mutant;

/// The variable, which has the number of a fault. The numbers begin with 1.
pub(super) const VARIABLE: &str = "USERFAULTFD_MUTANT";

/// What is appended to the library's root. A constructor reads the variable, since functions that run in signal handlers, or
/// must not allocate, ask for it.
pub(super) const MODULE: &str = r#"
#[expect(unsafe_code, reason = "reads the environment before main")]
mod mutant {
    use std::sync::atomic::{AtomicU32, Ordering};

    static NUMBER: AtomicU32 = AtomicU32::new(0);

    #[inline(never)]
    pub(crate) fn is(number: u32) -> bool {
        NUMBER.load(Ordering::Relaxed) == number
    }

    #[used]
    #[unsafe(link_section = ".init_array")]
    static READ: extern "C" fn() = read;

    extern "C" fn read() {
        // SAFETY: no thread changes the environment before `main`.
        let text = unsafe { libc::getenv(c"USERFAULTFD_MUTANT".as_ptr()) };
        if !text.is_null() {
            // SAFETY: the C library's string, which nothing changes.
            let number = unsafe { libc::atoi(text) };
            NUMBER.store(number as u32, Ordering::Relaxed);
        }
    }
}
"#;

/// The bodies of the functions of a file, with their braces.
#[derive(Default)]
struct Bodies(Vec<Range<usize>>);

impl Bodies {
    fn add(&mut self, signature: &syn::Signature, block: &syn::Block) {
        // What runs at compile time can't ask.
        if signature.constness.is_none() {
            self.0.push(block.span().byte_range());
        }
    }
}

impl<'ast> Visit<'ast> for Bodies {
    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.add(&item.sig, &item.block);
        visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.add(&item.sig, &item.block);
        visit::visit_impl_item_fn(self, item);
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(block) = &item.default {
            self.add(&item.sig, block);
        }
        visit::visit_trait_item_fn(self, item);
    }
}

/// The faults of one function, with their numbers.
type Faults<'a> = Vec<(usize, &'a Mutant)>;

/// Puts faults of one file into its text, each with its number. Returns the text, and the numbers of those that are in it:
/// not those of constants and types, and of functions within a function that has another fault.
pub(super) fn put_in(text: &str, mutants: &[(usize, &Mutant)]) -> Result<(String, Vec<usize>), String> {
    let file = syn::parse_file(text).map_err(|error| error.to_string())?;
    let mut bodies = Bodies::default();
    bodies.visit_file(&file);
    // What begins last is innermost.
    bodies.0.sort_by_key(|body| std::cmp::Reverse(body.start));
    let mut chosen: Vec<(Range<usize>, Faults<'_>)> = Vec::new();
    for (number, mutant) in mutants {
        let Some(start) = text.find(&mutant.from) else { continue };
        let end = start + mutant.from.len();
        let Some(body) = bodies.0.iter().find(|body| body.start < start && end < body.end) else { continue };
        let overlaps = |other: &Range<usize>| other.start < body.end && body.start < other.end;
        match chosen.iter_mut().find(|(other, _)| overlaps(other)) {
            Some((other, faults)) if other == body => faults.push((*number, mutant)),
            Some(_) => {}
            None => chosen.push((body.clone(), vec![(*number, mutant)])),
        }
    }
    chosen.sort_by_key(|(body, _)| std::cmp::Reverse(body.start));
    let (mut text, mut placed) = (text.to_owned(), Vec::new());
    for (body, faults) in chosen {
        let whole = text[body.clone()].to_owned();
        let mut switch = String::from("{ ");
        for (number, mutant) in faults {
            let faulty = whole.replacen(&mutant.from, &mutant.to, 1);
            switch += &format!("if crate::mutant::is({number}) {faulty} else ");
            placed.push(number);
        }
        text.replace_range(body, &format!("{switch}{whole} }}"));
    }
    Ok((text, placed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mutant(from: &str, to: &str) -> Mutant {
        let (from, to) = (from.to_owned(), to.to_owned());
        Mutant { file: String::new(), from, to, test: String::new(), invisible: None }
    }

    #[test]
    fn faults_are_put_in_side_by_side() {
        let text =
            "const A: u8 = 1;\nfn f() -> u8 { g(\"}\") + 2 }\nimpl S { const fn h() { 5 } fn i() { 3 } }\n";
        let mutants = [
            mutant("= 1;", "= 9;"),
            mutant("+ 2", "- 2"),
            mutant("g(\"}\")", "0"),
            mutant("5", "6"),
            mutant("{ 3 }", "{ 4 }"),
            mutant(" 3 ", " 7 "),
        ];
        let numbered: Vec<_> =
            mutants.iter().enumerate().map(|(index, mutant)| (index + 1, mutant)).collect();
        let (text, mut placed) = put_in(text, &numbered).unwrap();
        placed.sort_unstable();
        assert_eq!(placed, [2, 3, 6], "{text}");
        assert_eq!(
            text,
            "const A: u8 = 1;\nfn f() -> u8 { if crate::mutant::is(2) { g(\"}\") - 2 } else if crate::mutant::is(3) \
             { 0 + 2 } else { g(\"}\") + 2 } }\nimpl S { const fn h() { 5 } fn i() { if crate::mutant::is(6) { 7 } else \
             { 3 } } }\n"
        );
    }

    #[test]
    fn functions_within_functions_have_one_fault() {
        let text = "fn f() { fn g() { 1 } g(); 2 }";
        let (inner, outer) = (mutant("1", "3"), mutant("2", "4"));
        let (with, placed) = put_in(text, &[(1, &inner), (2, &outer)]).unwrap();
        assert_eq!(placed, [1]);
        assert_eq!(with, "fn f() { fn g() { if crate::mutant::is(1) { 3 } else { 1 } } g(); 2 }");
    }

    #[test]
    fn variable_is_the_one_that_the_module_reads() {
        assert!(MODULE.contains(VARIABLE));
        syn::parse_file(MODULE).unwrap();
    }
}
