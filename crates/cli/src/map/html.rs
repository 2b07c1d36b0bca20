//! The map as a page: the picture, and a table of the objects. Nothing is loaded from anywhere else.

use super::svg::{escape, picture};
use super::{Map, Object, human};

/// Rows of the table; the rest are summed up.
const ROWS: usize = 1000;

const STYLE: &str = "body{margin:0 auto;max-width:1200px;font:13px 'DejaVu Sans',Verdana,system-ui,sans-serif;color:#222}\
    svg{width:100%;height:auto}h2{font-size:15px;margin:12px 28px}\
    table{border-collapse:collapse;margin:0 28px 40px}td,th{padding:3px 14px 3px 0;text-align:right}\
    th{border-bottom:1px solid #999;cursor:default}td:first-child,th:first-child{text-align:left;\
    max-width:620px;overflow-wrap:anywhere}tr:hover td{background:#f0f4fa}\
    tfoot td{border-top:1px solid #999;font-weight:bold}\
    .fade rect[data-o]{opacity:.22}.fade rect[data-o].on{opacity:1;stroke:#000;stroke-width:1.2}";

/// Shows where else an object is when the mouse is on a part of it, or on its row.
const SCRIPT: &str = "const all=document.querySelectorAll('[data-o]'),svg=document.querySelector('svg');\
    all.forEach(e=>{e.addEventListener('mouseenter',()=>{svg.classList.add('fade');\
    all.forEach(o=>o.classList.toggle('on',o.dataset.o===e.dataset.o))});\
    e.addEventListener('mouseleave',()=>svg.classList.remove('fade'))});";

pub(super) fn document(map: &Map) -> String {
    let mut objects: Vec<(usize, &Object)> = map.objects.iter().enumerate().collect();
    objects.sort_by_key(|(index, object)| (std::cmp::Reverse(object.total()), *index));
    let (shown, rest) = objects.split_at(objects.len().min(ROWS));
    let mut rows: String = shown.iter().map(|&(index, object)| row(object, &format!(" data-o=\"{index}\""))).collect();
    if !rest.is_empty() {
        rows += &row(&sum(rest.iter().map(|&(_, object)| object), format!("{} others", rest.len())), "");
    }
    let total = row(&sum(map.objects.iter(), "all objects".to_owned()), "");
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Memory of the executor</title>\
         <style>{STYLE}</style></head><body>\n{}<h2>Objects</h2>\n<table><thead><tr><th>object</th><th>code</th>\
         <th>read-only data</th><th>data</th><th>all</th></tr></thead><tbody>\n{rows}</tbody><tfoot>{total}</tfoot></table>\n\
         <script>{SCRIPT}</script></body></html>\n",
        picture(map)
    )
}

fn sum<'a>(objects: impl Iterator<Item = &'a Object>, name: String) -> Object {
    objects.fold(Object { name, ..Object::default() }, |sum, object| Object {
        code: sum.code + object.code,
        read_only: sum.read_only + object.read_only,
        data: sum.data + object.data,
        ..sum
    })
}

fn row(object: &Object, attributes: &str) -> String {
    let cell = |bytes: u64| {
        format!("<td title=\"{bytes} bytes\">{}</td>", if bytes == 0 { "–".to_owned() } else { human(bytes) })
    };
    let cells: String = [object.code, object.read_only, object.data, object.total()].into_iter().map(cell).collect();
    format!("<tr{attributes}><td>{}</td>{cells}</tr>\n", escape(&object.name))
}
