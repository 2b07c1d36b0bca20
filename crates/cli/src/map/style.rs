//! Colours. Those of objects are Okabe and Ito's, which people with any colour vision can tell apart.

use super::{Map, What};
use farlink::addr::MemProt;

/// The objects with the most bytes have colours of their own: the fill, and the text on it.
const COLOURS: [(&str, &str); 7] = [
    ("#56b4e9", "#111"),
    ("#e69f00", "#111"),
    ("#009e73", "#fff"),
    ("#cc79a7", "#111"),
    ("#f0e442", "#111"),
    ("#0072b2", "#fff"),
    ("#d55e00", "#fff"),
];

/// Other objects have these by turns, so that neighbours differ.
const OTHERS: [(&str, &str); 2] = [("#b9c2cc", "#111"), ("#98a5b3", "#111")];

/// What is farlink's own.
pub(super) const OWN: (&str, &str) = ("#5b6470", "#fff");

/// The fill and the text of each object, and which have colours of their own, the largest first.
pub(super) struct Colours {
    of: Vec<(&'static str, &'static str)>,
    pub(super) largest: Vec<usize>,
}

impl Colours {
    pub(super) fn new(map: &Map) -> Self {
        let mut of: Vec<_> = (0..map.objects.len()).map(|index| OTHERS[index % OTHERS.len()]).collect();
        let mut largest: Vec<usize> = (0..map.objects.len()).collect();
        largest.sort_by_key(|&index| (std::cmp::Reverse(map.objects[index].total()), index));
        largest.truncate(COLOURS.len());
        for (&index, &colour) in largest.iter().zip(&COLOURS) {
            of[index] = colour;
        }
        Self { of, largest }
    }

    pub(super) fn object(&self, object: usize) -> (&'static str, &'static str) {
        self.of[object]
    }

    /// Returns the fill and the text of a piece. Patterns are defined in the document.
    pub(super) fn piece(&self, what: &What) -> (&'static str, &'static str) {
        match what {
            What::Section { object, .. } => self.object(*object),
            What::Padding => ("url(#padding)", "#111"),
            What::Other(_) => OWN,
            What::RestOfPage => ("url(#rest)", "#555"),
            What::Free => ("#fff", "#555"),
        }
    }
}

/// Returns the tint of memory with this protection.
pub(super) fn tint(prot: Option<MemProt>) -> &'static str {
    match prot {
        Some(prot) if prot.contains(MemProt::EXEC) => "#dbe9f6",
        Some(prot) if prot.contains(MemProt::WRITE) => "#fbe8d3",
        Some(_) => "#dff0e4",
        None => "#ececf2",
    }
}
