//! The map as JSON.

use super::{Map, Object, Piece, Reservation, Stripe, What, prot_name};
use serde_json::{Value, json};

pub(super) fn document(map: &Map) -> String {
    let objects: Vec<Value> = map.objects.iter().map(object).collect();
    let reservations: Vec<Value> = map.reservations.iter().map(|reservation| describe(map, reservation)).collect();
    let live = map.sum(|what| !matches!(what, What::Free | What::RestOfPage));
    let document = json!({
        "page_bytes": map.page_bytes,
        "committed_bytes": map.committed_bytes,
        "live_bytes": live,
        "padding_bytes": map.sum(|what| *what == What::Padding),
        "rest_of_pages_bytes": map.sum(|what| *what == What::RestOfPage),
        "objects": objects,
        "reservations": reservations,
    });
    format!("{document:#}\n")
}

fn object(object: &Object) -> Value {
    let Object { name, code, read_only, data } = object;
    json!({ "name": name, "code_bytes": code, "read_only_bytes": read_only, "data_bytes": data })
}

fn describe(map: &Map, reservation: &Reservation) -> Value {
    let stripe = |stripe: &Stripe| {
        let piece = |piece: &Piece| describe_piece(map, piece);
        json!({
            "holds": prot_name(stripe.prot),
            "prot": stripe.prot.map(|prot| prot.to_string()),
            "addr": stripe.range.start().to_string(),
            "bytes": stripe.range.len(),
            "pieces": stripe.pieces.iter().map(piece).collect::<Vec<Value>>(),
        })
    };
    json!({
        "addr": reservation.range.start().to_string(),
        "bytes": reservation.range.len(),
        "is_for_buffers": reservation.is_for_buffers,
        "stripes": reservation.stripes.iter().map(stripe).collect::<Vec<Value>>(),
    })
}

fn describe_piece(map: &Map, Piece { range, what }: &Piece) -> Value {
    let (kind, object, section) = match what {
        What::Section { object, section } => ("section", Some(map.objects[*object].name.as_str()), section.as_deref()),
        What::Padding => ("padding", None, None),
        What::Other(what) => (*what, None, None),
        What::RestOfPage => ("rest of a page", None, None),
        What::Free => ("free", None, None),
    };
    let mut value = json!({ "addr": range.start().to_string(), "bytes": range.len(), "kind": kind });
    for (key, name) in [("object", object), ("section", section)] {
        if let Some(name) = name {
            value[key] = name.into();
        }
    }
    value
}
